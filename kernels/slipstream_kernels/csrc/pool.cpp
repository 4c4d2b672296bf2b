#include "pool.h"

#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace slipstream {
namespace {

constexpr int kSpinsBeforeYield = 2000;  // some tens of microseconds: longer than a phase on an idle machine

// Waking a sleeping thread costs 50 to 100 microseconds, a step's work between two passes takes some 300. Whoever else
// wants the core in the meantime gets it, but for the first part.
constexpr auto kSpinBetweenPasses = std::chrono::microseconds(500), kSpinAlone = std::chrono::microseconds(100);

inline void pause() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#endif
}

class Pool {
   public:
    ~Pool() { stop(); }

    int size() const { return size_; }

    void resize(int number) {
        std::lock_guard<std::mutex> one_at_a_time(callers_);
        stop();
        is_stopping_ = false;
        size_ = number;
        for (int thread = 1; thread < number; ++thread) {
            workers_.emplace_back([this, thread, seen = epoch_.load()] { work(thread, seen); });
        }
    }

    void run(Pass pass, void* context) {
        std::lock_guard<std::mutex> one_at_a_time(callers_);
        for (int phase = 0; phase < num_used_; ++phase) {
            counters_[phase].taken.store(0, std::memory_order_relaxed);
            counters_[phase].done.store(0, std::memory_order_relaxed);
        }
        pass_ = pass;
        context_ = context;
        if (size_ > 1) open();
        Phases phases(counters_.get(), 0, size_);
        pass(context, phases);
        num_used_ = phases.num_run();
        if (size_ > 1) close();
    }

   private:
    void open() {
        is_open_.store(true);
        {
            std::lock_guard<std::mutex> lock(sleep_);
            epoch_.fetch_add(1);
        }
        if (num_asleep_.load() > 0) wake_.notify_all();
    }

    // After this no worker reads the counters or the context of the pass.
    void close() {
        is_open_.store(false);
        for (int spins = 0; num_inside_.load() > 0; ++spins) spins < kSpinsBeforeYield ? pause() : std::this_thread::yield();
    }

    void work(int thread, uint64_t seen) {
        while (true) {
            seen = next_epoch(seen);
            if (is_stopping_.load()) return;
            num_inside_.fetch_add(1);
            if (is_open_.load()) {
                Phases phases(counters_.get(), thread, size_);
                pass_(context_, phases);
            }
            num_inside_.fetch_sub(1);
        }
    }

    uint64_t next_epoch(uint64_t seen) {
        const auto began = std::chrono::steady_clock::now();
        for (auto now = began; now < began + kSpinBetweenPasses; now = std::chrono::steady_clock::now()) {
            for (int spin = 0; spin < 32; ++spin) {
                if (epoch_.load() != seen || is_stopping_.load()) return epoch_.load();
                pause();
            }
            if (now > began + kSpinAlone) std::this_thread::yield();
        }
        std::unique_lock<std::mutex> lock(sleep_);
        num_asleep_.fetch_add(1);
        wake_.wait(lock, [&] { return epoch_.load() != seen || is_stopping_.load(); });
        num_asleep_.fetch_sub(1);
        return epoch_.load();
    }

    void stop() {
        {
            std::lock_guard<std::mutex> lock(sleep_);
            is_stopping_.store(true);
        }
        wake_.notify_all();
        for (std::thread& worker : workers_) worker.join();
        workers_.clear();
    }

    std::mutex callers_;
    std::unique_ptr<PhaseCounters[]> counters_{new PhaseCounters[kMaxPhases]};
    int num_used_ = 0;
    int size_ = 1;
    Pass pass_ = nullptr;
    void* context_ = nullptr;
    std::vector<std::thread> workers_;
    std::atomic<uint64_t> epoch_{0};
    std::atomic<bool> is_open_{false}, is_stopping_{false};
    std::atomic<int> num_inside_{0}, num_asleep_{0};
    std::mutex sleep_;
    std::condition_variable wake_;
};

Pool& pool() {
    // Never destroyed: a worker must not outlive it, and at the end of a process nobody could join one any more.
    static Pool* const the_pool = new Pool;
    return *the_pool;
}

}  // namespace

void Phases::wait_for(PhaseCounters& phase) {
    for (int spins = 0; phase.done.load(std::memory_order_acquire) != kPublished; ++spins) {
        spins < kSpinsBeforeYield ? pause() : std::this_thread::yield();
    }
}

int num_threads() { return pool().size(); }

void set_num_threads(int number) {
    if (number != pool().size()) pool().resize(number);
}

void run_pass(Pass pass, void* context) { pool().run(pass, context); }

}  // namespace slipstream

extern "C" __attribute__((visibility("default"))) void slipstream_set_num_threads(int number) {
    slipstream::set_num_threads(number);
}
