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
constexpr int kHalf = 2 * kTileOutputs;     // outputs that are computed together
constexpr int kStepBytes = 2 * kTileBytes;  // of weights, for a line of inputs
constexpr int kStepLines = kStepBytes / kLine;
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

// Give the tiles their shapes, which takes as long as a dozen products of tiles, unless they have them.
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

// Lines of weights that are fetched in every step, for a later one.
struct Ahead {
    const char* data;
    int num_lines;
};

// Steps of the inner loop, from `weights` on.
struct Steps {
    const char* weights;
    int first, number;
};

template <bool kHasOthers>
void load_sums(const Sums& sums) {
    _tile_loadd(0, sums.of_row[0], sizeof sums.of_row[0]);
    _tile_loadd(1, sums.of_row[0] + kTileOutputs, sizeof sums.of_row[0]);
    if constexpr (kHasOthers) {
        _tile_loadd(2, sums.of_row[kTileRows], sizeof sums.of_row[0]);
        _tile_loadd(3, sums.of_row[kTileRows] + kTileOutputs, sizeof sums.of_row[0]);
    }
}

template <bool kHasOthers>
void store_sums(Sums& sums) {
    _tile_stored(0, sums.of_row[0], sizeof sums.of_row[0]);
    _tile_stored(1, sums.of_row[0] + kTileOutputs, sizeof sums.of_row[0]);
    if constexpr (kHasOthers) {
        _tile_stored(2, sums.of_row[kTileRows], sizeof sums.of_row[0]);
        _tile_stored(3, sums.of_row[kTileRows] + kTileOutputs, sizeof sums.of_row[0]);
    }
}

inline void zero_sums() {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}

// Some steps' products on top of the sums of up to 16 rows, or up to 32 with kHasOthers.
template <SlipstreamType kType, bool kHasOthers>
void add_up(const Steps& steps, const Lines& lines, Ahead ahead, Sums& sums) {
    steps.first == 0 ? zero_sums() : load_sums<kHasOthers>(sums);
    const char* weights = steps.weights;
    const uint8_t *line = lines.data + steps.first * kLine, *other_line = line + kTileRows * lines.stride;
    for (int step = 0; step < steps.number; ++step) {
        for (int i = 0; i < ahead.num_lines; ++i) __builtin_prefetch(ahead.data + i * kLine, 0, 3);
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
        ahead.data += kStepBytes;
        weights += kStepBytes;
        line += kLine;
        other_line += kLine;
    }
    store_sums<kHasOthers>(sums);
}

// Weights of so many steps, and of the next ones, stay in the first-level cache beside the rows.
constexpr int kChunkSteps = 4;

// So far ahead one turn alone fetches.
constexpr int kNearSteps = 2;

// Sums for all rows, a half of the panel's outputs after the other: `take(first row, number, first output, sums)`.
//
// More rows than fit two tiles take turns at chunks of the weights, and each turn fetches its part of the next chunk from
// memory, which so never waits for products. All turns have tiles of one shape: the last ones may share some rows.
template <SlipstreamType kType, class Take>
void add_up_panel(const TilePanel& panel, const Lines& lines, int num_rows, Take take) {
    constexpr int kLinesPerRow = kType == kInt8 ? 1 : kParts, kMostRows = 2 * kTileRows / kLinesPerRow;
    constexpr int kMostTurns = (kRowsAtOnce + kMostRows - 1) / kMostRows;
    const int num_turns = (num_rows + kMostRows - 1) / kMostRows, number = (num_rows + num_turns - 1) / num_turns;
    const int num_steps = panel.num_words / kTileWords;
    const int chunk = num_turns == 1 ? num_steps : kChunkSteps, steps_ahead = num_turns == 1 ? kNearSteps : kChunkSteps;
    const int lines_ahead = (kStepLines + num_turns - 1) / num_turns;
    const auto add = number * kLinesPerRow > kTileRows ? add_up<kType, true> : add_up<kType, false>;
    const auto first_row = [&](int turn) { return std::min(turn * number, num_rows - number); };
    Sums sums[kMostTurns];
    shape_tiles(number * kLinesPerRow);
    for (int half = 0; half < 2; ++half) {
        const char* const weights = panel.data + size_t(half) * num_steps * kStepBytes;
        for (int step = 0; step < num_steps; step += chunk) {
            const Steps steps{weights + step * kStepBytes, step, std::min(chunk, num_steps - step)};
            for (int turn = 0; turn < num_turns; ++turn) {
                const Lines some{lines.data + long(first_row(turn)) * kLinesPerRow * lines.stride, lines.stride};
                const Ahead ahead{steps.weights + steps_ahead * kStepBytes + turn * lines_ahead * kLine, lines_ahead};
                settle_memory();
                add(steps, some, ahead, sums[turn]);
            }
        }
        settle_memory();
        for (int turn = 0; turn < num_turns; ++turn) take(first_row(turn), number, half * kHalf, sums[turn]);
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
