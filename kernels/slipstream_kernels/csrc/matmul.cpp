#include "matmul.h"

#include <cfloat>
#include <cstdlib>
#include <type_traits>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace SLIPSTREAM_ISA {
namespace {

constexpr size_t kHugePage = size_t(1) << 21;
constexpr int kPrefetchBytes = 4096;  // a page ahead: hardware prefetchers stop at page borders

template <int kBytes>
inline void prefetch_ahead(const char* at) {
    for (int line = 0; line < kBytes; line += 64) __builtin_prefetch(at + kPrefetchBytes + line, 0, 3);
}

// One step of the inner loop for bf16: the even index comes first.
template <int kRows>
inline void accumulate_pair(const char* weights, const float* const* x, int i, Floats (&sums)[kRows][kVectors]) {
    Floats even[kVectors], odd[kVectors];
    for (int v = 0; v < kVectors; ++v) {
        Words pair;
        std::memcpy(&pair, weights + v * sizeof pair, sizeof pair);
        even[v] = (Floats)(pair << 16);
        odd[v] = (Floats)(pair & 0xFFFF0000u);
    }
    for (int row = 0; row < kRows; ++row) {
        const Floats first = splat(x[row][i]), second = splat(x[row][i + 1]);
        for (int v = 0; v < kVectors; ++v) sums[row][v] = fma(even[v], first, sums[row][v]);
        for (int v = 0; v < kVectors; ++v) sums[row][v] = fma(odd[v], second, sums[row][v]);
    }
}

template <int kRows, class Weight>
inline void accumulate_one(const char* weights, const float* const* x, int i, Floats (&sums)[kRows][kVectors]) {
    Floats weight[kVectors];
    for (int v = 0; v < kVectors; ++v) weight[v] = load(reinterpret_cast<const Weight*>(weights) + v * kLanes);
    for (int row = 0; row < kRows; ++row) {
        const Floats value = splat(x[row][i]);
        for (int v = 0; v < kVectors; ++v) sums[row][v] = fma(weight[v], value, sums[row][v]);
    }
}

// `scales` of the outputs are read with int8 only.
template <int kRows, SlipstreamType kType>
void tile(const char* weights, const float* scales, const float* const* x, int inner, float* out) {
    Floats sums[kRows][kVectors] = {};
    constexpr int kStep = kType == kBf16 ? 2 : 1, kBytes = kPanel * (kType == kInt8 ? 1 : 4);
    for (int i = 0; i < inner; i += kStep) {
        prefetch_ahead<kBytes>(weights);
        if constexpr (kType == kBf16) {
            accumulate_pair<kRows>(weights, x, i, sums);
        } else {
            accumulate_one<kRows, std::conditional_t<kType == kInt8, int8_t, float>>(weights, x, i, sums);
        }
        weights += kBytes;
    }
    for (int row = 0; row < kRows; ++row) {
        for (int v = 0; v < kVectors; ++v) {
            if constexpr (kType == kInt8) sums[row][v] = sums[row][v] * load(scales + v * kLanes);
            store(out + row * kPanel + v * kLanes, sums[row][v]);
        }
    }
}

template <SlipstreamType kType>
void tile_of(int num_rows, const char* weights, const float* scales, const float* const* x, int inner, float* out) {
    switch (num_rows) {
        case 1: return tile<1, kType>(weights, scales, x, inner, out);
        case 2: return tile<2, kType>(weights, scales, x, inner, out);
        case 3: return tile<3, kType>(weights, scales, x, inner, out);
#if defined(__AVX512F__)
        case 4: return tile<4, kType>(weights, scales, x, inner, out);
        case 5: return tile<5, kType>(weights, scales, x, inner, out);
        case 6: return tile<6, kType>(weights, scales, x, inner, out);
#endif
    }
}

void* allocate(size_t num_bytes) {
    const size_t rounded = (num_bytes + kHugePage - 1) / kHugePage * kHugePage;
    void* memory = std::aligned_alloc(num_bytes < kHugePage ? 64 : kHugePage, rounded);
#if defined(__linux__)
    if (memory != nullptr && num_bytes >= kHugePage) madvise(memory, rounded, MADV_HUGEPAGE);
#endif
    return memory;
}

int bytes_of(SlipstreamType type) { return type == kFp32 ? 4 : type == kBf16 ? 2 : 1; }

}  // namespace

Packed::~Packed() { std::free(data_); }

bool Packed::pack(const Source& source, int inner, const int* order, int num_outputs) {
    const int padded_inner = source.packed_type == kBf16 ? (inner + 1) / 2 * 2 : inner;
    const int num_panels = (num_outputs + kPanel - 1) / kPanel;
    const size_t panel_bytes = size_t(padded_inner) * kPanel * bytes_of(source.packed_type);
    char* const data = static_cast<char*>(allocate(panel_bytes * num_panels));
    if (data == nullptr) return false;
    std::free(data_);
    std::memset(data, 0, panel_bytes * num_panels);
    data_ = data;
    panel_bytes_ = panel_bytes;
    num_panels_ = num_panels;
    num_outputs_ = num_outputs;
    inner_ = padded_inner;
    type_ = source.packed_type;
    scales_.assign(type_ == kInt8 ? size_t(num_panels) * kPanel : 0, 0.0f);
    for (int o = 0; o < num_outputs; ++o) {
        if (order[o] < 0) continue;
        const size_t first = size_t(order[o]) * inner;
        type_ == kInt8 ? pack_rounded(source, first, inner, o) : pack_output(source, first, inner, o);
    }
    return true;
}

void Packed::pack_output(const Source& source, size_t first, int inner, int output) {
    char* const panel = data_ + size_t(output / kPanel) * panel_bytes_;
    for (int i = 0; i < inner; ++i) {
        if (type_ == kBf16) {
            const size_t word = size_t(i / 2) * kPanel + output % kPanel;
            const uint16_t* const bits = static_cast<const uint16_t*>(source.data) + first;
            reinterpret_cast<uint16_t*>(panel)[word * 2 + i % 2] = bits[i];
        } else {
            reinterpret_cast<float*>(panel)[size_t(i) * kPanel + output % kPanel] = source.at(first + i);
        }
    }
}

void Packed::pack_rounded(const Source& source, size_t first, int inner, int output) {
    float largest = 0.0f;
    for (int i = 0; i < inner; ++i) largest = std::max(largest, std::fabs(source.at(first + i)));
    const float scale = std::max(largest / 127.0f, FLT_MIN);
    scales_[output] = scale;
    int8_t* const panel = reinterpret_cast<int8_t*>(data_ + size_t(output / kPanel) * panel_bytes_);
    for (int i = 0; i < inner; ++i) {
        panel[size_t(i) * kPanel + output % kPanel] = int8_t(std::lrint(source.at(first + i) / scale));
    }
}

void Packed::product(int panel, const float* const* rows, int num_rows, float* out) const {
    const char* const weights = data_ + size_t(panel) * panel_bytes_;
    // Even tiles: 7 rows run as 4 and 3, since a tile of one row costs as much memory traffic as one of six.
    const int num_tiles = (num_rows + kMaxTileRows - 1) / kMaxTileRows;
    for (int first = 0, left = num_tiles; left > 0; --left) {
        const int size = (num_rows - first + left - 1) / left;
        float* const to = out + size_t(first) * kPanel;
        switch (type_) {
            case kFp32: tile_of<kFp32>(size, weights, nullptr, rows + first, inner_, to); break;
            case kBf16: tile_of<kBf16>(size, weights, nullptr, rows + first, inner_, to); break;
            case kInt8: tile_of<kInt8>(size, weights, &scales_[size_t(panel) * kPanel], rows + first, inner_, to); break;
        }
        first += size;
    }
}

}  // namespace SLIPSTREAM_ISA
