#include "matmul.h"

#include <cassert>
#include <cfloat>

#include "tiles.h"

namespace SLIPSTREAM_ISA {
namespace {

// Hardware prefetchers stop at the borders of a page of 4 KB: one ahead, the next one is under way. A processor with AVX-512
// goes on by itself behind what is nearer: on a Xeon, passes over 1 to 9 rows took a tenth less.
constexpr int kPrefetchBytes = kLanes == 16 ? 2048 : 4096;

// Up to this many rows take all strips of a panel at once: a tile of few sums would wait for its own additions.
constexpr int kFewRows = 2;

// A compiler that inlines several tiles into one function runs out of registers and keeps sums in memory.
#define SLIPSTREAM_NOINLINE __attribute__((noinline))

constexpr int kStepBytes = kStrip * 4;  // a step of the inner loop takes a word of every output

// Where the weights of a step lie: vector v belongs to strip v / kStripVectors.
struct Weights {
    const char* data;
    size_t strip_bytes;

    Words vector(int v) const {
        Words value;
        std::memcpy(&value, data + v / kStripVectors * strip_bytes + v % kStripVectors * sizeof value, sizeof value);
        return value;
    }

    void prefetch(int num_strips) const {
        for (int strip = 0; strip < num_strips; ++strip) {
            const char* const ahead = data + strip * strip_bytes + kPrefetchBytes;
            for (int line = 0; line < kStepBytes; line += kLine) __builtin_prefetch(ahead + line, 0, 3);
        }
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
    for (int v = 0; v < kWidth; ++v) half[v] = (Floats)(weights.vector(v) << 16);
    accumulate(half, x, i, sums);
    const Words mask = odd_half<kRows, kWidth>();
    for (int v = 0; v < kWidth; ++v) half[v] = (Floats)(weights.vector(v) & mask);
    accumulate(half, x, i + 1, sums);
}

template <int kRows, int kWidth>
inline void accumulate_one(Weights weights, const float* const* x, int i, Floats (&sums)[kRows][kWidth]) {
    Floats weight[kWidth];
    for (int v = 0; v < kWidth; ++v) weight[v] = (Floats)weights.vector(v);
    accumulate(weight, x, i, sums);
}

// One step for int8: four indices.
template <int kRows, int kWidth>
inline void accumulate_quad(Weights weights, const RoundedRow* x, int i, Ints (&sums)[kRows][kWidth]) {
    Words weight[kWidth];
    for (int v = 0; v < kWidth; ++v) weight[v] = weights.vector(v);
    for (int row = 0; row < kRows; ++row) {
        uint32_t quad;
        std::memcpy(&quad, x[row].bytes + i, sizeof quad);
        for (int v = 0; v < kWidth; ++v) sums[row][v] = add_products(sums[row][v], quad, weight[v]);
    }
}

// Tiles of a panel: `tile` computes the outputs of kStrips strips, from `first_output` of the panel on, for kRows rows.
template <SlipstreamType kType>
struct FloatTiles {
    using Row = const float*;

    template <int kRows, int kStrips>
    SLIPSTREAM_NOINLINE void tile(int /* first_output */, Weights weights, const float* const* x, int inner, float* out) const {
        constexpr int kWidth = kStrips * kStripVectors;
        Floats sums[kRows][kWidth] = {};
        for (int i = 0; i < inner; i += kType == kBf16 ? 2 : 1) {
            weights.prefetch(kStrips);
            if constexpr (kType == kBf16) {
                accumulate_pair(weights, x, i, sums);
            } else {
                accumulate_one(weights, x, i, sums);
            }
            weights.data += kStepBytes;
        }
        for (int row = 0; row < kRows; ++row) {
            for (int v = 0; v < kWidth; ++v) store(out + row * kPanel + v * kLanes, sums[row][v]);
        }
    }
};

struct RoundedTiles {
    using Row = RoundedRow;

    const float* scales;  // of the panel's outputs, as `offsets`
    const int32_t* offsets;

    template <int kRows, int kStrips>
    SLIPSTREAM_NOINLINE void tile(int first_output, Weights weights, const RoundedRow* x, int inner, float* out) const {
        constexpr int kWidth = kStrips * kStripVectors;
        Ints sums[kRows][kWidth] = {};
        for (int i = 0; i < inner; i += 4) {
            weights.prefetch(kStrips);
            accumulate_quad(weights, x, i, sums);
            weights.data += kStepBytes;
        }
        for (int v = 0; v < kWidth; ++v) {
            const int output = first_output + v * kLanes;
            for (int row = 0; row < kRows; ++row) store(out + row * kPanel + v * kLanes, scaled(sums[row][v], output, x[row]));
        }
    }

    // All outputs of a panel from their sums, which are of int32.
    void scale(const int32_t* sums, const RoundedRow* x, int num_rows, float* out) const {
        for (int row = 0; row < num_rows; ++row) {
            for (int o = 0; o < kPanel; o += kLanes) {
                store(out + row * kPanel + o, scaled(load(sums + row * kPanel + o), o, x[row]));
            }
        }
    }

    // A sum of integers as the product that it stands for; `output` is the first of the vector.
    Floats scaled(Ints sum, int output, const RoundedRow& row) const {
        return to_floats(sum - load(offsets + output)) * load(scales + output) * row.scale;
    }
};

// All strips of a panel for kRows rows.
template <int kRows, class Tiles>
void panel_of(const Tiles& tiles, Weights weights, const typename Tiles::Row* x, int inner, float* out) {
    constexpr int kStrips = kRows <= kFewRows ? kPanel / kStrip : 1;
    for (int first = 0; first < kPanel; first += kStrips * kStrip) {
        tiles.template tile<kRows, kStrips>(first, weights, x, inner, out + first);
        weights.data += kStrips * weights.strip_bytes;
    }
}

template <class Tiles>
void panel_of_rows(const Tiles& tiles, Weights weights, const typename Tiles::Row* x, int num_rows, int inner, float* out) {
    // Even tiles: 7 rows run as 4 and 3, since a tile of one row costs as much memory traffic as one of six.
    for (int first = 0, left = (num_rows + kMaxTileRows - 1) / kMaxTileRows; left > 0; --left) {
        const int size = (num_rows - first + left - 1) / left;
        float* const to = out + size_t(first) * kPanel;
        switch (size) {
            case 1: panel_of<1>(tiles, weights, x + first, inner, to); break;
            case 2: panel_of<2>(tiles, weights, x + first, inner, to); break;
            case 3: panel_of<3>(tiles, weights, x + first, inner, to); break;
            case 4: panel_of<4>(tiles, weights, x + first, inner, to); break;
            case 5: panel_of<5>(tiles, weights, x + first, inner, to); break;
            case 6: panel_of<6>(tiles, weights, x + first, inner, to); break;
        }
        static_assert(kMaxTileRows == 6);
        first += size;
    }
}

// How many inner indices a word of four bytes holds.
int per_word(SlipstreamType type) { return type == kFp32 ? 1 : type == kBf16 ? 2 : 4; }

// Words of an output, up to whole tiles where it lies in tiles.
int num_words_of(int inner, SlipstreamType type) {
    const int words = (inner + per_word(type) - 1) / per_word(type);
    return is_in_tiles(type) ? round_up(words, kTileWords) : words;
}

// Where the i-th weight of an output lies in its strip, in weights.
size_t place_in_strip(int i, int output, int num_words, SlipstreamType type) {
    const int number = per_word(type), word = i / number;
    if constexpr (kHasTiles) {
        if (is_in_tiles(type)) return place_in_tiles(word, output, num_words) * number + i % number;
    }
    return (size_t(word) * kStrip + output % kStrip) * number + i % number;
}

}  // namespace

void Packed::pack(const Source& source, int inner, const int* order, int num_outputs, Arena& memory) {
    const int num_panels = (num_outputs + kPanel - 1) / kPanel;
    type_ = source.packed_type;
    num_words_ = num_words_of(inner, type_);
    strip_bytes_ = size_t(num_words_) * kStepBytes;
    num_panels_ = num_panels;
    num_outputs_ = num_outputs;
    const size_t num_bytes = strip_bytes_ * (kPanel / kStrip) * num_panels;
    data_ = memory.take<char>(num_bytes);
    std::memset(data_, 0, num_bytes);
    scales_.assign(type_ == kInt8 ? size_t(num_panels) * kPanel : 0, 0.0f);
    offsets_.assign(scales_.size(), 0);
    for (int o = 0; o < num_outputs; ++o) {
        if (order[o] < 0) continue;
        const size_t first = size_t(order[o]) * inner;
        type_ == kInt8 ? pack_rounded(source, first, inner, o) : pack_output(source, first, inner, o);
    }
}

void Packed::pack_output(const Source& source, size_t first, int inner, int output) {
    char* const strip = strip_of(output);
    for (int i = 0; i < inner; ++i) {
        const size_t place = place_in_strip(i, output, num_words_, type_);
        if (type_ == kBf16) {
            reinterpret_cast<uint16_t*>(strip)[place] = static_cast<const uint16_t*>(source.data)[first + i];
        } else {
            reinterpret_cast<float*>(strip)[place] = source.at(first + i);
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
        const int rounded = int(std::lrint(source.at(first + i) / scale));
        strip[place_in_strip(i, output, num_words_, kInt8)] = int8_t(rounded);
        offsets_[output] += kByteOfZero * rounded;
    }
}

void Packed::product(int panel, const Inputs& inputs, const int* places, int num_rows, float* out) const {
    assert(!is_in_tiles(type_) || places[num_rows - 1] == places[0] + num_rows - 1);
    const Weights weights{strip_of(panel * kPanel), strip_bytes_};
    const int inner = num_words_ * per_word(type_);
    if (is_rounded()) {
        RoundedRow rows[kRowsAtOnce];
        for (int i = 0; i < num_rows; ++i) rows[i] = inputs.rounded(places[i]);
        const RoundedTiles tiles{&scales_[size_t(panel) * kPanel], &offsets_[size_t(panel) * kPanel]};
        if constexpr (kHasTiles) {
            alignas(kLine) int32_t sums[kRowsAtOnce * kPanel];
            rounded_product({weights.data, num_words_}, inputs, places[0], num_rows, sums);
            return tiles.scale(sums, rows, num_rows, out);
        }
        return panel_of_rows(tiles, weights, rows, num_rows, inner, out);
    }
    if constexpr (kHasTiles) {
        if (type_ == kBf16) return split_product({weights.data, num_words_}, inputs, places[0], num_rows, out);
    }
    const float* rows[kRowsAtOnce];
    for (int i = 0; i < num_rows; ++i) rows[i] = inputs.row(places[i]);
    if (type_ == kBf16) return panel_of_rows(FloatTiles<kBf16>(), weights, rows, num_rows, inner, out);
    panel_of_rows(FloatTiles<kFp32>(), weights, rows, num_rows, inner, out);
}

}  // namespace SLIPSTREAM_ISA
