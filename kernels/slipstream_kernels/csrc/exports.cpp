// The C interface of one instruction set: the decoder, and its ops one by one for tests and measurements.
#include <algorithm>
#include <vector>

#include "decoder.h"
#include "export.h"
#include "rows.h"

namespace isa = SLIPSTREAM_ISA;

extern "C" {

auto SLIPSTREAM_EXPORT(decoder_new)(const SlipstreamSizes* sizes) -> void* {
    try {
        return new isa::Decoder(*sizes);
    } catch (const std::bad_alloc&) {
        return nullptr;
    }
}

void SLIPSTREAM_EXPORT(decoder_free)(void* decoder) { delete static_cast<isa::Decoder*>(decoder); }

int SLIPSTREAM_EXPORT(decoder_set)(void* decoder, int32_t part, int32_t layer, int32_t expert, const void* data,
                                   int32_t type) {
    return static_cast<isa::Decoder*>(decoder)->set(SlipstreamPart(part), layer, expert, data, SlipstreamType(type));
}

void SLIPSTREAM_EXPORT(decoder_forward)(void* decoder, const SlipstreamPlan* plan, float* logits, int32_t* experts) {
    static_cast<isa::Decoder*>(decoder)->forward(*plan, logits, experts);
}

void SLIPSTREAM_EXPORT(decoder_keep)(void* decoder, int32_t num_moves, const int32_t* moves) {
    static_cast<isa::Decoder*>(decoder)->keep(num_moves, moves);
}

auto SLIPSTREAM_EXPORT(matrix_new)(const void* data, int32_t type, int32_t outputs, int32_t inner) -> void* {
    std::vector<int> order(outputs);
    for (int o = 0; o < outputs; ++o) order[o] = o;
    auto* const matrix = new isa::Packed;
    if (matrix->pack(data, SlipstreamType(type), inner, order.data(), outputs)) return matrix;
    delete matrix;
    return nullptr;
}

void SLIPSTREAM_EXPORT(matrix_free)(void* matrix) { delete static_cast<isa::Packed*>(matrix); }

// out[rows, outputs] = x[rows, inner] * matrix^T.
void SLIPSTREAM_EXPORT(matrix_product)(const void* matrix, const float* x, int32_t num_rows, float* out) {
    struct Call {
        const isa::Packed* matrix;
        const float* x;
        int num_rows;
        float* out;
    } call{static_cast<const isa::Packed*>(matrix), x, num_rows, out};
    slipstream::run_pass(
        [](void* context, slipstream::Phases& phases) {
            const Call& call = *static_cast<Call*>(context);
            const int outputs = call.matrix->num_outputs(), inner = call.matrix->inner();
            phases.run(call.matrix->num_panels(), [&](int panel) {
                std::vector<const float*> rows(call.num_rows);
                for (int row = 0; row < call.num_rows; ++row) rows[row] = call.x + size_t(row) * inner;
                std::vector<float> tile(size_t(call.num_rows) * isa::kPanel);
                call.matrix->product(panel, rows.data(), call.num_rows, tile.data());
                const int width = std::min(isa::kPanel, outputs - panel * isa::kPanel);
                for (int row = 0; row < call.num_rows; ++row) {
                    std::copy_n(tile.data() + row * isa::kPanel, width,
                                call.out + size_t(row) * outputs + panel * isa::kPanel);
                }
            });
        },
        &call);
}

void SLIPSTREAM_EXPORT(rms_norm)(const float* x, const float* weight, int32_t num_rows, int32_t size, float epsilon,
                                 float* out) {
    for (int row = 0; row < num_rows; ++row) isa::rms_norm(x + row * size, weight, size, epsilon, out + row * size);
}

void SLIPSTREAM_EXPORT(rotate)(float* heads, const float* cosines, const float* sines, int32_t num_heads, int32_t size) {
    for (int head = 0; head < num_heads; ++head) isa::rotate(heads + head * size, cosines, sines, size);
}

void SLIPSTREAM_EXPORT(route)(const float* x, const float* router, int32_t num_rows, int32_t hidden, int32_t num_experts,
                              int32_t num_chosen, int32_t normalizes, int32_t* experts, float* weights) {
    for (int row = 0; row < num_rows; ++row) {
        isa::route(x + row * hidden, router, hidden, num_experts, num_chosen, normalizes != 0,
                   experts + row * num_chosen, weights + row * num_chosen);
    }
}

void SLIPSTREAM_EXPORT(exp)(const float* x, int32_t size, float* out) {
    for (int i = 0; i < size; ++i) out[i] = isa::exp(isa::splat(x[i]))[0];
}

}  // extern "C"
