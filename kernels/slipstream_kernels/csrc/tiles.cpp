#include "tiles.h"

#if defined(__AMX_BF16__) && defined(__AMX_INT8__)

#include <immintrin.h>

#include <algorithm>
#include <cstring>

#include "matmul.h"

namespace SLIPSTREAM_ISA {
namespace {

constexpr int kTileRows = 16;
constexpr int kTileOutputs = 16;
constexpr int kTileBytes = kTileRows * kLine;
constexpr int kHalf = 2 * kTileOutputs;    // outputs that are computed together
constexpr int kStepBytes = 2 * kTileBytes;  // of weights, for a line of inputs
constexpr int kPrefetchBytes = 2 * kStepBytes;
static_assert(kPanel == 2 * kHalf);

// What the tile registers hold; an instruction names them by number.
//
//   0 1  sums of the first 16 rows     4  inputs of the first 16 rows     6 7  weights
//   2 3  sums of the others            5  inputs of the others
struct alignas(kLine) TileShapes {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};

    explicit TileShapes(int num_rows) {
        const int num_first = std::min(num_rows, kTileRows), num_others = std::max(num_rows - kTileRows, 1);
        const int of_tile[] = {num_first, num_first, num_others, num_others, num_first, num_others, kTileRows, kTileRows};
        for (int tile = 0; tile < 8; ++tile) {
            row_bytes[tile] = kLine;
            rows[tile] = uint8_t(of_tile[tile]);
        }
    }
};

// How many rows this thread's tiles are shaped for; 0 if they are not.
thread_local int shaped_rows = 0;

// Intrinsics do not tell the compiler all that they read and write.
inline void settle_memory() { asm volatile("" ::: "memory"); }

// Give the tiles their shapes, which takes as long as eight products of tiles, unless they have them.
void shape_tiles(int num_rows) {
    if (shaped_rows == num_rows) return;
    const TileShapes shapes(num_rows);
    settle_memory();
    _tile_loadconfig(&shapes);
    shaped_rows = num_rows;
}

// Rows that tiles are loaded from, `stride` bytes apart.
struct Lines {
    const uint8_t* data;
    long stride;
};

// Of two tiles of rows at most, for half a panel's outputs; int32 where weights are int8.
struct alignas(kLine) Sums {
    float of_row[2 * kTileRows][kHalf];
};

#define SLIPSTREAM_MULTIPLY(sums, inputs, weights)   \
    if constexpr (kType == kInt8) {                  \
        _tile_dpbusd(sums, inputs, weights);         \
    } else {                                         \
        _tile_dpbf16ps(sums, inputs, weights);       \
    }

// Sums for up to 16 rows, or up to 32 with kHasOthers. Weights come from memory in the first
// pass over them, later from the second-level cache.
template <SlipstreamType kType, bool kHasOthers>
void add_up(const char* weights, int num_steps, const Lines& lines, bool is_first, Sums& sums) {
    _tile_zero(0);
    _tile_zero(1);
    if constexpr (kHasOthers) {
        _tile_zero(2);
        _tile_zero(3);
    }
    const uint8_t *line = lines.data, *other_line = lines.data + kTileRows * lines.stride;
    for (int step = 0; step < num_steps; ++step) {
        if (is_first) {
            for (int at = 0; at < kStepBytes; at += kLine) __builtin_prefetch(weights + kPrefetchBytes + at, 0, 3);
        }
        _tile_loadd(4, line, lines.stride);
        _tile_loadd(6, weights, kLine);
        SLIPSTREAM_MULTIPLY(0, 4, 6);
        _tile_loadd(7, weights + kTileBytes, kLine);
        SLIPSTREAM_MULTIPLY(1, 4, 7);
        if constexpr (kHasOthers) {
            _tile_loadd(5, other_line, lines.stride);
            SLIPSTREAM_MULTIPLY(2, 5, 6);
            SLIPSTREAM_MULTIPLY(3, 5, 7);
        }
        weights += kStepBytes;
        line += kLine;
        other_line += kLine;
    }
    _tile_stored(0, sums.of_row[0], sizeof sums.of_row[0]);
    _tile_stored(1, sums.of_row[0] + kTileOutputs, sizeof sums.of_row[0]);
    if constexpr (kHasOthers) {
        _tile_stored(2, sums.of_row[kTileRows], sizeof sums.of_row[0]);
        _tile_stored(3, sums.of_row[kTileRows] + kTileOutputs, sizeof sums.of_row[0]);
    }
}

// Sums for all rows, a half of the panel's outputs after the other: `take(first row, number, first output, sums)`.
template <SlipstreamType kType, class Take>
void add_up_panel(const TilePanel& panel, const Lines& lines, int num_rows, Take take) {
    constexpr int kLinesPerRow = kType == kInt8 ? 1 : kParts, kMostRows = 2 * kTileRows / kLinesPerRow;
    const int num_steps = panel.num_words / kTileWords;
    Sums sums;
    for (int half = 0; half < 2; ++half) {
        const char* const weights = panel.data + size_t(half) * num_steps * kStepBytes;
        for (int first = 0; first < num_rows; first += kMostRows) {
            const int number = std::min(kMostRows, num_rows - first);
            const Lines some{lines.data + long(first) * kLinesPerRow * lines.stride, lines.stride};
            shape_tiles(number * kLinesPerRow);
            settle_memory();
            const auto add = number * kLinesPerRow > kTileRows ? add_up<kType, true> : add_up<kType, false>;
            add(weights, num_steps, some, first == 0, sums);
            settle_memory();
            take(first, number, half * kHalf, sums);
        }
    }
}

}  // namespace

TileSession::TileSession() { shaped_rows = 0; }

TileSession::~TileSession() { _tile_release(); }

size_t place_in_tiles(int word, int output, int num_words) {
    const int column = output % kPanel, step = word / kTileWords;
    const int tile = (column / kHalf * (num_words / kTileWords) + step) * 2 + column % kHalf / kTileOutputs;
    return (size_t(tile) * kTileRows + word % kTileWords) * kTileOutputs + column % kTileOutputs;
}

void split_product(const TilePanel& weights, const Inputs& inputs, int place, int num_rows, float* out) {
    const SplitRows rows = inputs.split_rows(place);
    const Lines lines{reinterpret_cast<const uint8_t*>(rows.parts), long(rows.stride) * long(sizeof(uint16_t))};
    add_up_panel<kBf16>(weights, lines, num_rows, [&](int first, int number, int output, const Sums& sums) {
        for (int i = 0; i < number; ++i) {
            const auto part = [&](int which, int o) { return load(sums.of_row[i * kParts + which] + o); };
            float* const to = out + size_t(first + i) * kPanel + output;
            for (int o = 0; o < kHalf; o += kLanes) store(to + o, part(0, o) + (part(1, o) + part(2, o)));
        }
    });
}

void rounded_product(const TilePanel& weights, const Inputs& inputs, int place, int num_rows, int32_t* out) {
    const Lines lines{inputs.rounded(place).bytes, inputs.byte_stride()};
    add_up_panel<kInt8>(weights, lines, num_rows, [&](int first, int number, int output, const Sums& sums) {
        for (int i = 0; i < number; ++i) {
            std::memcpy(out + size_t(first + i) * kPanel + output, sums.of_row[i], sizeof sums.of_row[i]);
        }
    });
}

void multiply_tiles(int64_t num_rounds) {
    const TileSession tiles;
    static_assert(kRoundOutputs == kHalf && kRoundInner == 2 * kTileWords);
    shape_tiles(kRoundRows * kParts);
    for (int64_t round = 0; round < num_rounds; ++round) {
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
}

}  // namespace SLIPSTREAM_ISA

#endif
