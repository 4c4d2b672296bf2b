// What this machine could do at best, in the instruction set of the kernels: the roofline they are measured against.
#include <atomic>
#include <chrono>
#include <cstdint>
#include <thread>
#include <vector>

#include "export.h"
#include "simd.h"
#include "tiles.h"

namespace SLIPSTREAM_ISA {
namespace {

// Enough sums in flight to hide the four cycles of an addition on two ports, and few enough for 16 registers.
constexpr int kSums = 8;

// Reading asks for what comes, as products do: by itself a processor kept fewer lines under way (33 GB/s, and 38 so).
constexpr int kFloatsAhead = 256;

// A result that nobody reads would let the compiler leave the work out.
std::atomic<float> sink{0.0f};

// Seconds from the moment all threads are ready until the last one is done.
template <class Work>
double seconds_on(int num_threads, Work work) {
    std::atomic<int> num_ready{0};
    std::atomic<bool> is_open{false};
    std::vector<std::thread> threads;
    for (int thread = 0; thread < num_threads; ++thread) {
        threads.emplace_back([&, thread] {
            num_ready.fetch_add(1);
            while (!is_open.load()) std::this_thread::yield();
            sink.store(work(thread));
        });
    }
    while (num_ready.load() < num_threads) std::this_thread::yield();
    const auto began = std::chrono::steady_clock::now();
    is_open.store(true);
    for (std::thread& thread : threads) thread.join();
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count();
}

float total(const Floats (&sums)[kSums]) {
    float all = 0.0f;
    for (const Floats& sum : sums) all += sum_lanes(sum);
    return all;
}

float read(const float* data, int64_t num_floats, int num_passes) {
    Floats sums[kSums] = {};
    for (int pass = 0; pass < num_passes; ++pass) {
        for (int64_t at = 0; at + kSums * kLanes <= num_floats; at += kSums * kLanes) {
            for (int sum = 0; sum < kSums; ++sum) {
                const float* const from = data + at + sum * kLanes;
                __builtin_prefetch(from + kFloatsAhead, 0, 3);
                sums[sum] += load(from);
            }
        }
    }
    return total(sums);
}

float multiply_add(int64_t num_rounds) {
    Floats sums[kSums];
    for (int sum = 0; sum < kSums; ++sum) sums[sum] = splat(float(sum));  // equal sums would be computed once
    Floats factor = splat(1.0f), addend = splat(1e-9f);
    for (int64_t round = 0; round < num_rounds; ++round) {
        // Unknown again in every round, or the compiler could fold the rounds into one.
#if defined(__x86_64__) || defined(__i386__)
        asm volatile("" : "+x"(factor), "+x"(addend));
#elif defined(__GNUC__)
        asm volatile("" : "+m"(factor), "+m"(addend));
#endif
        for (int sum = 0; sum < kSums; ++sum) sums[sum] = fma(sums[sum], factor, addend);
        for (int sum = 0; sum < kSums; ++sum) sums[sum] = fma(sums[sum], factor, addend);
    }
    return total(sums);
}

}  // namespace
}  // namespace SLIPSTREAM_ISA

extern "C" {

// Seconds in which `num_threads` threads, each with its own part, read `num_bytes` bytes `num_passes` times.
double SLIPSTREAM_EXPORT(read_seconds)(const void* data, int64_t num_bytes, int32_t num_threads,
                                       int32_t num_passes) noexcept {
    const int64_t part = num_bytes / int64_t(sizeof(float)) / num_threads;
    const float* const from = static_cast<const float*>(data);
    return SLIPSTREAM_ISA::seconds_on(
        num_threads, [=](int thread) { return SLIPSTREAM_ISA::read(from + thread * part, part, num_passes); });
}

// Seconds in which `num_threads` threads do `num_rounds` rounds of multiply-adds with bf16 weights each, in registers alone;
// `num_multiply_adds` gets the number of all of them together.
double SLIPSTREAM_EXPORT(multiply_add_seconds)(int32_t num_threads, int64_t num_rounds,
                                               int64_t* num_multiply_adds) noexcept {
    using namespace SLIPSTREAM_ISA;
    if constexpr (kHasTiles) {
        *num_multiply_adds = num_threads * num_rounds * kRoundRows * kRoundOutputs * kRoundInner;
        return seconds_on(num_threads, [=](int) { return multiply_tiles(num_rounds), 0.0f; });
    }
    *num_multiply_adds = num_threads * num_rounds * 2 * kSums * kLanes;
    return seconds_on(num_threads, [=](int) { return multiply_add(num_rounds); });
}

}  // extern "C"
