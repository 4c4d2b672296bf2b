// Products by matrix tiles, where the processor has them (AMX): bf16 weights times split rows, int8 ones times bytes.
//
// A tile holds 16 rows of 64 bytes. One of weights is 16 words of 16 outputs; one of inputs is a line of 16 rows, so that
// ten rows fill two of them with three parts each, or 32 with their bytes. An instruction adds their products to 16 x 16
// sums, in one order and for every row by itself: what a row gets does not depend on its tile.
#pragma once

#include <cstddef>

#include "abi.h"
#include "inputs.h"

namespace SLIPSTREAM_ISA {

constexpr int kTileWords = 16;  // words of an output that a tile of weights holds

constexpr bool is_in_tiles(SlipstreamType type) { return kHasTiles && type != kFp32; }

// What a thread opens around its products. In between, other code of the process may give tiles other shapes.
class TileSession {
   public:
#if SLIPSTREAM_TILES
    TileSession();
    ~TileSession();
#else
    TileSession() {}
#endif
    TileSession(const TileSession&) = delete;
    TileSession& operator=(const TileSession&) = delete;
};

// A panel of weights in tiles: of half of its outputs, then of the others; of a half, two tiles side by side for every
// kTileWords words.
struct TilePanel {
    const char* data;
    int num_words;  // of an output, a multiple of kTileWords
};

// Where a word of an output lies in its panel, in words.
size_t place_in_tiles(int word, int output, int num_words);

// Of rows at neighbouring places, the first at `place`: out[i][0..kPanel), the products or the sums of integers.
void split_product(const TilePanel& weights, const Inputs& inputs, int place, int num_rows, float* out);
void rounded_product(const TilePanel& weights, const Inputs& inputs, int place, int num_rows, int32_t* out);

// For measurements: so many rounds of products of as many rows as fit two tiles, in registers alone, and what a round stands for in
// multiply-adds of rows and weights.
constexpr int kRoundRows = 10, kRoundOutputs = 32, kRoundInner = 32;
void multiply_tiles(int64_t num_rounds);

}  // namespace SLIPSTREAM_ISA
