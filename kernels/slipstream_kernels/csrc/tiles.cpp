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
static_assert(kPanel == 2 * kHalf);

// What the tile registers hold; an instruction names them by number.
//
//   0 1  sums of a tile of inputs       4  that tile     6 7  weights
//   2 3  sums of another                5  the other
struct alignas(kLine) TileShapes {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};

    explicit TileShapes(int num_rows) {
        for (int tile = 0; tile < 8; ++tile) {
            row_bytes[tile] = kLine;
            rows[tile] = uint8_t(tile < 6 ? num_rows : kTileRows);
        }
    }
};

// How many rows of inputs and sums this thread's tiles are shaped for; 0 if they are not.
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

// Of a tile of inputs, for half a panel's outputs; int32 where weights are int8.
struct alignas(kLine) Sums {
    float of_row[kTileRows][kHalf];
};

#define SLIPSTREAM_MULTIPLY(sums, inputs, weights)   \
    if constexpr (kType == kInt8) {                  \
        _tile_dpbusd(sums, inputs, weights);         \
    } else {                                         \
        _tile_dpbf16ps(sums, inputs, weights);       \
    }

// Some versions of GCC 11 and 12 cast what stands before a plus sign in an intrinsic's argument, so these have none.
template <bool kHasTwo>
void load_sums(const Sums* sums) {
    const float *first = sums[0].of_row[0], *first_right = first + kTileOutputs;
    _tile_loadd(0, first, sizeof sums[0].of_row[0]);
    _tile_loadd(1, first_right, sizeof sums[0].of_row[0]);
    if constexpr (kHasTwo) {
        const float *second = sums[1].of_row[0], *second_right = second + kTileOutputs;
        _tile_loadd(2, second, sizeof sums[1].of_row[0]);
        _tile_loadd(3, second_right, sizeof sums[1].of_row[0]);
    }
}

template <bool kHasTwo>
void store_sums(Sums* sums) {
    float *first = sums[0].of_row[0], *first_right = first + kTileOutputs;
    _tile_stored(0, first, sizeof sums[0].of_row[0]);
    _tile_stored(1, first_right, sizeof sums[0].of_row[0]);
    if constexpr (kHasTwo) {
        float *second = sums[1].of_row[0], *second_right = second + kTileOutputs;
        _tile_stored(2, second, sizeof sums[1].of_row[0]);
        _tile_stored(3, second_right, sizeof sums[1].of_row[0]);
    }
}

inline void zero_sums() {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}

// How weights come from memory. The first pair of tiles fetches them shortly before it reads them: behind accesses that are
// near, the processor itself goes on fetching, but not beyond a page of 4 KB, and that far ahead passes over few rows took
// an eighth longer. The pairs after it, of many, fetch for the next chunk, and no further than the second-level cache: what
// waits for memory holds places that their inputs need.
constexpr int kBytesAhead = kStepBytes;

inline void fetch_tile(const char* weights) {
    for (int at = 0; at < kTileBytes; at += kLine) __builtin_prefetch(weights + kBytesAhead + at, 0, 3);
}

struct NextChunk {
    const char* data;
    int lines_in_step;

    void fetch(int step) const {
        const char* const from = data + step * lines_in_step * kLine;
        for (int line = 0; line < lines_in_step; ++line) __builtin_prefetch(from + line * kLine, 0, 2);
    }
};

// Steps of the inner loop, whose weights these are.
struct Steps {
    const char* weights;
    int first, num_steps;
};

// Two tiles of inputs, from where their rows begin, or the first alone.
struct TilePair {
    const uint8_t *first, *second;
    long stride;
};

// Some steps' products on top of the sums of one tile of inputs, or two with kHasTwo.
template <SlipstreamType kType, bool kHasTwo, bool kIsFirst>
void add_up(const Steps& steps, const TilePair& tiles, const NextChunk& next, Sums* sums) {
    steps.first == 0 ? zero_sums() : load_sums<kHasTwo>(sums);
    const char* left = steps.weights;
    const uint8_t *first = tiles.first + steps.first * kLine, *second = tiles.second + steps.first * kLine;
    for (int step = 0; step < steps.num_steps; ++step) {
        const char* const right = left + kTileBytes;
        kIsFirst ? fetch_tile(left) : next.fetch(step);
        _tile_loadd(4, first, tiles.stride);
        _tile_loadd(6, left, kLine);
        SLIPSTREAM_MULTIPLY(0, 4, 6);
        if constexpr (kIsFirst) fetch_tile(right);
        _tile_loadd(7, right, kLine);
        SLIPSTREAM_MULTIPLY(1, 4, 7);
        if constexpr (kHasTwo) {
            _tile_loadd(5, second, tiles.stride);
            SLIPSTREAM_MULTIPLY(2, 5, 6);
            SLIPSTREAM_MULTIPLY(3, 5, 7);
        }
        left += kStepBytes;
        first += kLine;
        second += kLine;
    }
    store_sums<kHasTwo>(sums);
}

// Pairs that do not all fit take turns at so many steps, 8 KB of weights if there are two.
constexpr int chunk_of(int num_pairs, int num_steps) { return num_pairs == 1 ? num_steps : num_pairs == 2 ? 4 : 8; }

// Sums for all rows, a half of the panel's outputs after the other: `take(first row, number of rows, first output, sums)`.
//
// Tiles of inputs take turns in pairs, at chunks of the weights, which the first pair gets from memory and the others find in
// the cache. All tiles have one shape; the last one may share some rows with the one before it.
template <SlipstreamType kType, class Take>
void add_up_panel(const TilePanel& panel, const TileRows& rows, int num_rows, Take take) {
    constexpr int kRowHeight = kType == kInt8 ? 1 : kParts, kMostRows = kTileRows / kRowHeight;
    constexpr int kMostTiles = (kRowsAtOnce + kMostRows - 1) / kMostRows;
    const int num_tiles = (num_rows + kMostRows - 1) / kMostRows, num_in_tile = (num_rows + num_tiles - 1) / num_tiles;
    const int num_pairs = (num_tiles + 1) / 2, num_steps = panel.num_words / kTileWords;
    const int chunk = chunk_of(num_pairs, num_steps);
    const int lines_in_step = num_pairs < 3 ? 0 : (kStepBytes / kLine + num_pairs - 2) / (num_pairs - 1);
    const auto first_row = [&](int tile) { return std::min(tile * num_in_tile, num_rows - num_in_tile); };
    const auto inputs = [&](int tile) { return rows.data + long(first_row(tile)) * kRowHeight * rows.stride; };
    Sums sums[kMostTiles];
    shape_tiles(num_in_tile * kRowHeight);
    for (int half = 0; half < 2; ++half) {
        const char* const weights = panel.data + size_t(half) * num_steps * kStepBytes;
        for (int step = 0; step < num_steps; step += chunk) {
            const Steps steps{weights + step * kStepBytes, step, std::min(chunk, num_steps - step)};
            const char* const next = steps.weights + chunk * kStepBytes;
            for (int pair = 0; pair < num_pairs; ++pair) {
                const int tile = 2 * pair;
                const bool has_two = tile + 1 < num_tiles, is_first = pair == 0;
                const auto add = has_two ? is_first ? add_up<kType, true, true> : add_up<kType, true, false>
                                         : is_first ? add_up<kType, false, true> : add_up<kType, false, false>;
                const NextChunk part{next + long(pair - 1) * chunk * lines_in_step * kLine, lines_in_step};
                settle_memory(sums);
                add(steps, {inputs(tile), inputs(tile + 1), rows.stride}, part, sums + tile);
            }
        }
        settle_memory(sums);
        for (int tile = 0; tile < num_tiles; ++tile) take(first_row(tile), num_in_tile, half * kHalf, sums[tile]);
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
    static_assert(kRoundRows == 2 * (kTileRows / kParts) && kRoundOutputs == kHalf && kRoundInner == 2 * kTileWords);
    shape_tiles(kRoundRows / 2 * kParts);
    for (int64_t round = 0; round < num_rounds; ++round) {
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
}

}  // namespace SLIPSTREAM_ISA

#endif
