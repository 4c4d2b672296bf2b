// Memory that is taken piece by piece and given back all at once, in huge pages where the system has them.
//
// A pass reads every weight once. In pages of 4 KB it would look up an address for each of them, which the processor has
// long forgotten since the last pass, and its prefetchers would stop at every page's end.
#pragma once

#include <cstddef>
#include <vector>

namespace slipstream {

constexpr int kLine = 64;  // bytes of a cache line

class Arena {
   public:
    Arena() = default;
    Arena(const Arena&) = delete;
    Arena& operator=(const Arena&) = delete;
    ~Arena();

    // Room for so many values, at a cache line, holding anything. Throws std::bad_alloc.
    template <class Value>
    Value* take(size_t number) {
        return reinterpret_cast<Value*>(take_bytes(number * sizeof(Value)));
    }

   private:
    char* take_bytes(size_t number);

    std::vector<char*> chunks_;
    char* next_ = nullptr;
    size_t num_left_ = 0;
};

}  // namespace slipstream
