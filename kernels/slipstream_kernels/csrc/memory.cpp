#include "memory.h"

#include <algorithm>
#include <cstdlib>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace slipstream {
namespace {

constexpr size_t kHugePage = size_t(1) << 21;

// Pages that nobody touches are never handed out, so only addresses are spent on what is left of a chunk.
constexpr size_t kLeastChunk = kHugePage << 5;

size_t rounded_up(size_t number, size_t multiple) { return (number + multiple - 1) / multiple * multiple; }

char* new_chunk(size_t num_bytes) {
    char* const chunk = static_cast<char*>(std::aligned_alloc(kHugePage, num_bytes));
    if (chunk == nullptr) throw std::bad_alloc();
#if defined(__linux__)
    madvise(chunk, num_bytes, MADV_HUGEPAGE);
#endif
    return chunk;
}

}  // namespace

Arena::~Arena() {
    for (char* chunk : chunks_) std::free(chunk);
}

char* Arena::take_bytes(size_t number) {
    const size_t size = rounded_up(number, kLine);
    if (size > num_left_) {
        const size_t chunk_size = std::max(rounded_up(size, kHugePage), kLeastChunk);
        chunks_.push_back(nullptr);  // a place first: a chunk without one would be lost
        chunks_.back() = next_ = new_chunk(chunk_size);
        num_left_ = chunk_size;
    }
    char* const taken = next_;
    next_ += size;
    num_left_ -= size;
    return taken;
}

}  // namespace slipstream
