// Keys and values: of committed positions in blocks, and of the nodes of draft trees until they are kept.
#pragma once

#include "abi.h"
#include "attention.h"
#include "memory.h"

namespace SLIPSTREAM_ISA {

// A position within a block. Node slots are numbered through blocks of their own, behind those of committed positions.
struct CachePlace {
    int block, offset;
};

class Cache {
   public:
    // All zeros; in bf16 where products are of int8, since nobody needs those to be exact. Throws std::bad_alloc.
    Cache(const SlipstreamSizes& sizes, slipstream::Arena& memory);

    bool is_rounded() const { return is_rounded_; }
    CachePlace place_of_node(int slot) const { return {num_blocks_ + slot / kBlock, slot % kBlock}; }

    // `Stored` is uint16_t if the cache is rounded, else float.
    template <class Stored>
    HeadCache<Stored> head(int layer, int kv_head) const {
        Stored* const keys = keys_of<Stored>(layer, kv_head, 0);
        return {keys, keys + head_dim_ * kBlock, 2L * kv_heads_ * head_dim_ * kBlock, num_blocks_};
    }

    void write(int layer, int kv_head, CachePlace place, const float* key, const float* value);

    // What one place holds to another, in all layers.
    void copy(CachePlace from, CachePlace to);

   private:
    // [layer][block][kv head][keys, values][head_dim * kBlock].
    template <class Stored>
    Stored* keys_of(int layer, int kv_head, int block) const {
        const size_t index = (size_t(layer) * num_all_blocks_ + block) * kv_heads_ + kv_head;
        return static_cast<Stored*>(store_) + index * 2 * head_dim_ * kBlock;
    }

    template <class Stored>
    Stored* values_of(int layer, int kv_head, int block) const {
        return keys_of<Stored>(layer, kv_head, block) + head_dim_ * kBlock;
    }

    template <class Stored>
    void write_as(int layer, int kv_head, CachePlace place, const float* key, const float* value);
    template <class Stored>
    void copy_as(CachePlace from, CachePlace to);

    bool is_rounded_;
    int layers_, kv_heads_, head_dim_, num_blocks_;
    int num_all_blocks_;  // those of node slots too
    void* store_;
};

}  // namespace SLIPSTREAM_ISA
