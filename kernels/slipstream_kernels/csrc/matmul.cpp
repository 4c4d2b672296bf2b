#include "matmul.h"

#include <cstdlib>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace SLIPSTREAM_ISA {
namespace {

constexpr size_t kHugePage = size_t(1) << 21;
constexpr int kPrefetchBytes = 4096;  // a page ahead: hardware prefetchers stop at page borders

inline void prefetch_ahead(const char* at) {
    for (int line = 0; line < kPanel * 4; line += 64) __builtin_prefetch(at + kPrefetchBytes + line, 0, 3);
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

template <int kRows>
inline void accumulate_one(const char* weights, const float* const* x, int i, Floats (&sums)[kRows][kVectors]) {
    Floats weight[kVectors];
    std::memcpy(weight, weights, sizeof weight);
    for (int row = 0; row < kRows; ++row) {
        const Floats value = splat(x[row][i]);
        for (int v = 0; v < kVectors; ++v) sums[row][v] = fma(weight[v], value, sums[row][v]);
    }
}

template <int kRows, SlipstreamType kType>
void tile(const char* weights, const float* const* x, int inner, float* out) {
    Floats sums[kRows][kVectors] = {};
    constexpr int kStep = kType == kBf16 ? 2 : 1;
    for (int i = 0; i < inner; i += kStep) {
        prefetch_ahead(weights);
        if constexpr (kType == kBf16) {
            accumulate_pair<kRows>(weights, x, i, sums);
        } else {
            accumulate_one<kRows>(weights, x, i, sums);
        }
        weights += kPanel * 4;
    }
    for (int row = 0; row < kRows; ++row) {
        for (int v = 0; v < kVectors; ++v) store(out + row * kPanel + v * kLanes, sums[row][v]);
    }
}

template <SlipstreamType kType>
void tile_of(int num_rows, const char* weights, const float* const* x, int inner, float* out) {
    switch (num_rows) {
        case 1: return tile<1, kType>(weights, x, inner, out);
        case 2: return tile<2, kType>(weights, x, inner, out);
        case 3: return tile<3, kType>(weights, x, inner, out);
#if defined(__AVX512F__)
        case 4: return tile<4, kType>(weights, x, inner, out);
        case 5: return tile<5, kType>(weights, x, inner, out);
        case 6: return tile<6, kType>(weights, x, inner, out);
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

inline uint16_t bf16_at(const void* source, size_t index) { return static_cast<const uint16_t*>(source)[index]; }

}  // namespace

Packed::~Packed() { std::free(data_); }

bool Packed::pack(const void* source, SlipstreamType type, int inner, const int* order, int num_outputs) {
    const int padded_inner = type == kBf16 ? (inner + 1) / 2 * 2 : inner;
    const int num_panels = (num_outputs + kPanel - 1) / kPanel;
    const size_t panel_bytes = size_t(padded_inner) * kPanel * (type == kBf16 ? 2 : 4);
    char* const data = static_cast<char*>(allocate(panel_bytes * num_panels));
    if (data == nullptr) return false;
    std::free(data_);
    std::memset(data, 0, panel_bytes * num_panels);
    for (int o = 0; o < num_outputs; ++o) {
        if (order[o] < 0) continue;
        char* const panel = data + size_t(o / kPanel) * panel_bytes;
        const size_t source_row = size_t(order[o]) * inner;
        for (int i = 0; i < inner; ++i) {
            if (type == kBf16) {
                const size_t word = size_t(i / 2) * kPanel + o % kPanel;
                reinterpret_cast<uint16_t*>(panel)[word * 2 + i % 2] = bf16_at(source, source_row + i);
            } else {
                reinterpret_cast<float*>(panel)[size_t(i) * kPanel + o % kPanel] =
                    static_cast<const float*>(source)[source_row + i];
            }
        }
    }
    data_ = data;
    panel_bytes_ = panel_bytes;
    num_panels_ = num_panels;
    num_outputs_ = num_outputs;
    inner_ = padded_inner;
    type_ = type;
    return true;
}

void Packed::product(int panel, const float* const* rows, int num_rows, float* out) const {
    const char* const weights = data_ + size_t(panel) * panel_bytes_;
    // Even tiles: 7 rows run as 4 and 3, since a tile of one row costs as much memory traffic as one of six.
    const int num_tiles = (num_rows + kMaxTileRows - 1) / kMaxTileRows;
    for (int first = 0, left = num_tiles; left > 0; --left) {
        const int size = (num_rows - first + left - 1) / left;
        if (type_ == kBf16) {
            tile_of<kBf16>(size, weights, rows + first, inner_, out + size_t(first) * kPanel);
        } else {
            tile_of<kFp32>(size, weights, rows + first, inner_, out + size_t(first) * kPanel);
        }
        first += size;
    }
}

}  // namespace SLIPSTREAM_ISA
