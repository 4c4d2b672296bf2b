#include "cache.h"

#include <algorithm>

namespace SLIPSTREAM_ISA {
namespace {

void convert(float from, float& to) { to = from; }
void convert(float from, uint16_t& to) { to = to_bf16(from); }

}  // namespace

Cache::Cache(const SlipstreamSizes& sizes, slipstream::Arena& memory)
    : is_rounded_(sizes.packs_int8 != 0),
      layers_(sizes.layers),
      kv_heads_(sizes.kv_heads),
      head_dim_(sizes.head_dim),
      num_blocks_(sizes.num_blocks),
      num_all_blocks_(sizes.num_blocks + round_up(sizes.num_node_slots, kBlock) / kBlock) {
    const size_t num_values = size_t(layers_) * num_all_blocks_ * kv_heads_ * 2 * head_dim_ * kBlock;
    const size_t num_bytes = num_values * (is_rounded_ ? sizeof(uint16_t) : sizeof(float));
    char* const bytes = memory.take<char>(num_bytes);
    std::fill_n(bytes, num_bytes, 0);
    store_ = bytes;
}

template <class Stored>
void Cache::write_as(int layer, int kv_head, CachePlace place, const float* key, const float* value) {
    Stored* const keys = keys_of<Stored>(layer, kv_head, place.block) + place.offset;
    Stored* const values = values_of<Stored>(layer, kv_head, place.block) + place.offset * head_dim_;
    for (int i = 0; i < head_dim_; ++i) convert(key[i], keys[i * kBlock]);
    for (int i = 0; i < head_dim_; ++i) convert(value[i], values[i]);
}

void Cache::write(int layer, int kv_head, CachePlace place, const float* key, const float* value) {
    if (is_rounded_) write_as<uint16_t>(layer, kv_head, place, key, value);
    else write_as<float>(layer, kv_head, place, key, value);
}

template <class Stored>
void Cache::copy_as(CachePlace from, CachePlace to) {
    for (int layer = 0; layer < layers_; ++layer) {
        for (int head = 0; head < kv_heads_; ++head) {
            const Stored* const keys = keys_of<Stored>(layer, head, from.block) + from.offset;
            Stored* const to_keys = keys_of<Stored>(layer, head, to.block) + to.offset;
            for (int i = 0; i < head_dim_; ++i) to_keys[i * kBlock] = keys[i * kBlock];
            const Stored* const values = values_of<Stored>(layer, head, from.block) + from.offset * head_dim_;
            std::copy_n(values, head_dim_, values_of<Stored>(layer, head, to.block) + to.offset * head_dim_);
        }
    }
}

void Cache::copy(CachePlace from, CachePlace to) {
    if (is_rounded_) copy_as<uint16_t>(from, to);
    else copy_as<float>(from, to);
}

}  // namespace SLIPSTREAM_ISA
