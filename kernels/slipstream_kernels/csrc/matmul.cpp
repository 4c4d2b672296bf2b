#include "matmul.h"

#include <cfloat>
#include <type_traits>

namespace SLIPSTREAM_ISA {
namespace {

constexpr int kPrefetchBytes = 4096;  // a page ahead: hardware prefetchers stop at page borders
constexpr int kLine = 64;

// Up to this many rows take all strips of a panel at once: a tile of few sums would wait for its own additions.
constexpr int kFewRows = 2;

// So many tiles read int8 weights as floats that were made once, unless these would drive out the second-level cache.
constexpr int kTilesWorthConverting = 3, kMostFloats = 1 << 16;

// Where the weights of a step lie: vector v belongs to strip v / kStripVectors.
struct Weights {
    const char* data;
    size_t strip_bytes;

    template <int kVectorBytes>
    const char* vector(int v) const {
        return data + v / kStripVectors * strip_bytes + v % kStripVectors * kVectorBytes;
    }
};

constexpr Words kOddHalf = Words{} + 0xFFFF0000u;
const volatile Words kOddHalfInMemory = kOddHalf;

// Where sums, weights, an input and the mask would take every register, a compiler that keeps the mask in one spills a sum.
template <int kRows, int kWidth>
inline Words odd_half() {
    if constexpr (kRows * kWidth + kWidth + 2 < kRegisters) return kOddHalf;
    return kOddHalfInMemory;
}

template <int kRows, int kWidth>
inline void accumulate(const Floats (&weight)[kWidth], const float* const* x, int i, Floats (&sums)[kRows][kWidth]) {
    for (int row = 0; row < kRows; ++row) {
        const Floats value = splat(x[row][i]);
        for (int v = 0; v < kWidth; ++v) sums[row][v] = fma(weight[v], value, sums[row][v]);
    }
}

// One step of the inner loop for bf16: the even index comes first.
template <int kRows, int kWidth>
inline void accumulate_pair(Weights weights, const float* const* x, int i, Floats (&sums)[kRows][kWidth]) {
    Floats half[kWidth];
    Words pair;
    for (int v = 0; v < kWidth; ++v) {
        std::memcpy(&pair, weights.vector<sizeof pair>(v), sizeof pair);
        half[v] = (Floats)(pair << 16);
    }
    accumulate(half, x, i, sums);
    const Words mask = odd_half<kRows, kWidth>();
    for (int v = 0; v < kWidth; ++v) {
        std::memcpy(&pair, weights.vector<sizeof pair>(v), sizeof pair);
        half[v] = (Floats)(pair & mask);
    }
    accumulate(half, x, i + 1, sums);
}

template <class Weight, int kRows, int kWidth>
inline void accumulate_one(Weights weights, const float* const* x, int i, Floats (&sums)[kRows][kWidth]) {
    Floats weight[kWidth];
    for (int v = 0; v < kWidth; ++v) {
        weight[v] = load(reinterpret_cast<const Weight*>(weights.vector<kLanes * sizeof(Weight)>(v)));
    }
    accumulate(weight, x, i, sums);
}

// The outputs of kStrips strips for kRows rows, times their `scales` unless these are null.
template <int kRows, int kStrips, SlipstreamType kType>
void tile(Weights weights, const float* scales, const float* const* x, int inner, float* out) {
    constexpr int kWidth = kStrips * kStripVectors;
    constexpr int kStep = kType == kBf16 ? 2 : 1, kBytes = kStrip * (kType == kInt8 ? 1 : 4);
    Floats sums[kRows][kWidth] = {};
    for (int i = 0; i < inner; i += kStep) {
        if (i / kStep * kBytes % kLine == 0) {
            for (int strip = 0; strip < kStrips; ++strip) {
                const char* const ahead = weights.data + strip * weights.strip_bytes + kPrefetchBytes;
                for (int line = 0; line < kBytes; line += kLine) __builtin_prefetch(ahead + line, 0, 3);
            }
        }
        if constexpr (kType == kBf16) {
            accumulate_pair(weights, x, i, sums);
        } else {
            accumulate_one<std::conditional_t<kType == kInt8, int8_t, float>>(weights, x, i, sums);
        }
        weights.data += kBytes;
    }
    for (int row = 0; row < kRows; ++row) {
        for (int v = 0; v < kWidth; ++v) {
            if (scales != nullptr) sums[row][v] = sums[row][v] * load(scales + v * kLanes);
            store(out + row * kPanel + v * kLanes, sums[row][v]);
        }
    }
}

// All strips of a panel for kRows rows.
template <int kRows, SlipstreamType kType>
void panel_of(Weights weights, const float* scales, const float* const* x, int inner, float* out) {
    constexpr int kStrips = kRows <= kFewRows ? kPanel / kStrip : 1;
    for (int first = 0; first < kPanel; first += kStrips * kStrip) {
        tile<kRows, kStrips, kType>(weights, scales == nullptr ? nullptr : scales + first, x, inner, out + first);
        weights.data += kStrips * weights.strip_bytes;
    }
}

int bytes_of(SlipstreamType type) { return type == kFp32 ? 4 : type == kBf16 ? 2 : 1; }

}  // namespace

void Packed::pack(const Source& source, int inner, const int* order, int num_outputs, Arena& memory) {
    const int padded_inner = source.packed_type == kBf16 ? (inner + 1) / 2 * 2 : inner;
    const int num_panels = (num_outputs + kPanel - 1) / kPanel;
    const size_t strip_bytes = size_t(padded_inner) * kStrip * bytes_of(source.packed_type);
    const size_t num_bytes = strip_bytes * (kPanel / kStrip) * num_panels;
    data_ = memory.take<char>(num_bytes);
    std::memset(data_, 0, num_bytes);
    strip_bytes_ = strip_bytes;
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
}

void Packed::pack_output(const Source& source, size_t first, int inner, int output) {
    char* const strip = strip_of(output);
    for (int i = 0; i < inner; ++i) {
        if (type_ == kBf16) {
            const size_t word = size_t(i / 2) * kStrip + output % kStrip;
            const uint16_t* const bits = static_cast<const uint16_t*>(source.data) + first;
            reinterpret_cast<uint16_t*>(strip)[word * 2 + i % 2] = bits[i];
        } else {
            reinterpret_cast<float*>(strip)[size_t(i) * kStrip + output % kStrip] = source.at(first + i);
        }
    }
}

void Packed::pack_rounded(const Source& source, size_t first, int inner, int output) {
    float largest = 0.0f;
    for (int i = 0; i < inner; ++i) largest = std::max(largest, std::fabs(source.at(first + i)));
    const float scale = std::max(largest / 127.0f, FLT_MIN);
    scales_[output] = scale;
    int8_t* const strip = reinterpret_cast<int8_t*>(strip_of(output));
    for (int i = 0; i < inner; ++i) {
        strip[size_t(i) * kStrip + output % kStrip] = int8_t(std::lrint(source.at(first + i) / scale));
    }
}

namespace {

template <SlipstreamType kType>
void panel_of_rows(Weights weights, const float* scales, const float* const* rows, int num_rows, int inner, float* out) {
    switch (num_rows) {
        case 1: return panel_of<1, kType>(weights, scales, rows, inner, out);
        case 2: return panel_of<2, kType>(weights, scales, rows, inner, out);
        case 3: return panel_of<3, kType>(weights, scales, rows, inner, out);
        case 4: return panel_of<4, kType>(weights, scales, rows, inner, out);
        case 5: return panel_of<5, kType>(weights, scales, rows, inner, out);
        case 6: return panel_of<6, kType>(weights, scales, rows, inner, out);
    }
    static_assert(kMaxTileRows == 6);
}

// The weights of a panel as floats, which many rows read again and again; valid until the thread's next call.
Weights as_floats(Weights panel, int inner) {
    static thread_local std::vector<float> floats;
    floats.resize(size_t(inner) * kPanel);
    float* to = floats.data();
    for (int strip = 0; strip < kPanel / kStrip; ++strip) {
        const int8_t* const from = reinterpret_cast<const int8_t*>(panel.data + strip * panel.strip_bytes);
        for (int at = 0; at < inner * kStrip; at += kLanes, to += kLanes) store(to, load(from + at));
    }
    return {reinterpret_cast<const char*>(floats.data()), size_t(inner) * kStrip * sizeof(float)};
}

}  // namespace

void Packed::product(int panel, const float* const* rows, int num_rows, float* out) const {
    Weights weights{strip_of(panel * kPanel), strip_bytes_};
    SlipstreamType type = type_;
    const float* const scales = type == kInt8 ? &scales_[size_t(panel) * kPanel] : nullptr;
    // Even tiles: 7 rows run as 4 and 3, since a tile of one row costs as much memory traffic as one of six.
    const int num_tiles = (num_rows + kMaxTileRows - 1) / kMaxTileRows;
    if (type == kInt8 && num_tiles >= kTilesWorthConverting && inner_ * kPanel <= kMostFloats) {
        weights = as_floats(weights, inner_);
        type = kFp32;
    }
    for (int first = 0, left = num_tiles; left > 0; --left) {
        const int size = (num_rows - first + left - 1) / left;
        float* const to = out + size_t(first) * kPanel;
        switch (type) {
            case kFp32: panel_of_rows<kFp32>(weights, scales, rows + first, size, inner_, to); break;
            case kBf16: panel_of_rows<kBf16>(weights, scales, rows + first, size, inner_, to); break;
            case kInt8: panel_of_rows<kInt8>(weights, scales, rows + first, size, inner_, to); break;
        }
        first += size;
    }
}

}  // namespace SLIPSTREAM_ISA
