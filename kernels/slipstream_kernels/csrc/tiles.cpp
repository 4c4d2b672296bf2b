#include "tiles.h"

#if SLIPSTREAM_TILES

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

// Intrinsics do not tell the compiler all that they read and write of what this points to.
inline void settle_memory(const void* what) { asm volatile("" : : "r"(what) : "memory"); }

// Give the tiles their shapes, which takes as long as a dozen products of tiles, unless they have them.
void shape_tiles(int num_rows) {
    if (shaped_rows == num_rows) return;
    const TileShapes shapes(num_rows);
    settle_memory(&shapes);
    _tile_loadconfig(&shapes);
    shaped_rows = num_rows;
}

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

// Lines of weights that are fetched in every step for a later one, a quarter of them at a time: what waits for memory
// takes the places of what comes from the caches, so tiles would wait behind many.
struct Ahead {
    const char* data;
    int num_in_quarter;

    void fetch(int quarter) const {
        const char* const from = data + quarter * num_in_quarter * kLine;
        for (int line = 0; line < num_in_quarter; ++line) __builtin_prefetch(from + line * kLine, 0, 3);
    }
};

// Steps of the inner loop, whose weights these are.
struct Steps {
    const char* weights;
    int first, num_steps;
};

// Some versions of GCC 11 and 12 cast what stands before a plus sign in an intrinsic's argument, so these have none.
template <bool kHasOthers>
void load_sums(const Sums& sums) {
    const float *first = sums.of_row[0], *second = first + kTileOutputs;
    _tile_loadd(0, first, sizeof sums.of_row[0]);
    _tile_loadd(1, second, sizeof sums.of_row[0]);
    if constexpr (kHasOthers) {
        const float *others = sums.of_row[kTileRows], *others_second = others + kTileOutputs;
        _tile_loadd(2, others, sizeof sums.of_row[0]);
        _tile_loadd(3, others_second, sizeof sums.of_row[0]);
    }
}

template <bool kHasOthers>
void store_sums(Sums& sums) {
    float *first = sums.of_row[0], *second = first + kTileOutputs;
    _tile_stored(0, first, sizeof sums.of_row[0]);
    _tile_stored(1, second, sizeof sums.of_row[0]);
    if constexpr (kHasOthers) {
        float *others = sums.of_row[kTileRows], *others_second = others + kTileOutputs;
        _tile_stored(2, others, sizeof sums.of_row[0]);
        _tile_stored(3, others_second, sizeof sums.of_row[0]);
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
void add_up(const Steps& steps, const TileRows& rows, Ahead ahead, Sums& sums) {
    steps.first == 0 ? zero_sums() : load_sums<kHasOthers>(sums);
    const char* weights = steps.weights;
    const uint8_t *first = rows.data + steps.first * kLine, *others = first + kTileRows * rows.stride;
    for (int step = 0; step < steps.num_steps; ++step) {
        const char* const second_weights = weights + kTileBytes;
        ahead.fetch(0);
        _tile_loadd(4, first, rows.stride);
        _tile_loadd(6, weights, kLine);
        SLIPSTREAM_MULTIPLY(0, 4, 6);
        ahead.fetch(1);
        _tile_loadd(7, second_weights, kLine);
        ahead.fetch(2);
        SLIPSTREAM_MULTIPLY(1, 4, 7);
        if constexpr (kHasOthers) {
            _tile_loadd(5, others, rows.stride);
            SLIPSTREAM_MULTIPLY(2, 5, 6);
            SLIPSTREAM_MULTIPLY(3, 5, 7);
        }
        ahead.fetch(3);
        ahead.data += kStepBytes;
        weights += kStepBytes;
        first += kLine;
        others += kLine;
    }
    store_sums<kHasOthers>(sums);
}

// Rows that take turns do so every 8 KB of weights: with 16 KB a pass over 17 or 33 rows took a tenth longer.
constexpr int kChunkSteps = 4;

// So far ahead rows that need no turns fetch.
constexpr int kNearSteps = 2;

// Sums for all rows, a half of the panel's outputs after the other: `take(first row, number of rows, first output, sums)`.
//
// More rows than fit two tiles take turns at chunks of the weights, and each turn fetches its part of the next chunk from
// memory, which so never waits for products. All turns have tiles of one shape: the last ones may share some rows.
template <SlipstreamType kType, class Take>
void add_up_panel(const TilePanel& panel, const TileRows& rows, int num_rows, Take take) {
    constexpr int kRowHeight = kType == kInt8 ? 1 : kParts, kMostRows = 2 * kTileRows / kRowHeight;
    constexpr int kMostTurns = (kRowsAtOnce + kMostRows - 1) / kMostRows;
    const int num_turns = (num_rows + kMostRows - 1) / kMostRows, num_in_turn = (num_rows + num_turns - 1) / num_turns;
    const int num_steps = panel.num_words / kTileWords;
    const int chunk = num_turns == 1 ? num_steps : kChunkSteps, steps_ahead = num_turns == 1 ? kNearSteps : kChunkSteps;
    const int quarter_ahead = (kStepLines / 4 + num_turns - 1) / num_turns;
    const auto add = num_in_turn * kRowHeight > kTileRows ? add_up<kType, true> : add_up<kType, false>;
    const auto first_row = [&](int turn) { return std::min(turn * num_in_turn, num_rows - num_in_turn); };
    Sums sums[kMostTurns];
    shape_tiles(num_in_turn * kRowHeight);
    for (int half = 0; half < 2; ++half) {
        const char* const weights = panel.data + size_t(half) * num_steps * kStepBytes;
        for (int step = 0; step < num_steps; step += chunk) {
            const Steps steps{weights + step * kStepBytes, step, std::min(chunk, num_steps - step)};
            for (int turn = 0; turn < num_turns; ++turn) {
                const TileRows some{rows.data + long(first_row(turn)) * kRowHeight * rows.stride, rows.stride};
                const Ahead ahead{steps.weights + steps_ahead * kStepBytes + turn * 4 * quarter_ahead * kLine, quarter_ahead};
                settle_memory(sums);
                add(steps, some, ahead, sums[turn]);
            }
        }
        settle_memory(sums);
        for (int turn = 0; turn < num_turns; ++turn) take(first_row(turn), num_in_turn, half * kHalf, sums[turn]);
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
    const auto take = [&](int first, int number, int output, const Sums& sums) {
        for (int i = 0; i < number; ++i) {
            const auto part = [&](int which, int o) { return load(sums.of_row[i * kParts + which] + o); };
            float* const to = out + size_t(first + i) * kPanel + output;
            for (int o = 0; o < kHalf; o += kLanes) store(to + o, part(0, o) + (part(1, o) + part(2, o)));
        }
    };
    add_up_panel<kBf16>(weights, inputs.tile_rows(place), num_rows, take);
}

void rounded_product(const TilePanel& weights, const Inputs& inputs, int place, int num_rows, int32_t* out) {
    const auto take = [&](int first, int number, int output, const Sums& sums) {
        for (int i = 0; i < number; ++i) {
            std::memcpy(out + size_t(first + i) * kPanel + output, sums.of_row[i], sizeof sums.of_row[i]);
        }
    };
    add_up_panel<kInt8>(weights, inputs.tile_rows(place), num_rows, take);
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
