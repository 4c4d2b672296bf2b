// Threads that share the work of one forward pass.
//
// A pass is a sequence of phases, a phase a number of tasks. Threads take tasks as they come, so who computes what is left
// to chance; results are not, because every output is computed by one task in a fixed order. A phase is over when all its
// tasks are done, not when all threads have arrived: a thread that the system has not scheduled yet delays nobody, and
// joins in whatever phase it finds.
//
// Neighbouring tasks read neighbouring memory, so a thread takes several at once, ever fewer towards the end; and half the
// threads take them from the end, so that where tasks differ along the way, different ones run side by side.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace slipstream {

constexpr int kMaxPhases = 4096;

class Phases;

// The body of a pass: called once by every thread that takes part, each going through the same phases.
using Pass = void (*)(void* context, Phases& phases);

struct PhaseCounters {
    alignas(64) std::atomic<uint64_t> taken{0};  // tasks taken from the front, and from the end in the upper half
    alignas(64) std::atomic<int32_t> done{0};
};

// Tasks first <= index < end.
struct Tasks {
    int32_t first, end;
};

// One thread's walk through the phases of a pass.
class Phases {
   public:
    Phases(PhaseCounters* counters, int thread, int num_threads)
        : counters_(counters), thread_(thread), num_threads_(num_threads) {}

    int thread() const { return thread_; }
    int num_run() const { return phase_; }

    // Run `task(index)` for every index below `num_tasks`, and return when all of them are done. `finish` runs once,
    // after the last task and before any thread goes on.
    template <class Task, class Finish>
    void run(int num_tasks, Task task, Finish finish) {
        PhaseCounters& phase = counters_[phase_++];
        for (Tasks tasks = take(phase, num_tasks); tasks.first < tasks.end; tasks = take(phase, num_tasks)) {
            for (int32_t index = tasks.first; index < tasks.end; ++index) task(index);
            const int32_t number = tasks.end - tasks.first;
            if (phase.done.fetch_add(number) + number == num_tasks) {
                finish();
                phase.done.store(kPublished, std::memory_order_release);
            }
        }
        if (num_tasks > 0) wait_for(phase);
    }

    template <class Task>
    void run(int num_tasks, Task task) {
        run(num_tasks, task, [] {});
    }

   private:
    static constexpr int32_t kPublished = INT32_MAX;

    // Of what is left, a thread takes one part in so many as there are threads, times this.
    static constexpr int32_t kPartsPerThread = 2;

    // The next tasks for this thread; none if all are taken.
    Tasks take(PhaseCounters& phase, int32_t num_tasks) {
        const bool is_from_end = thread_ % 2 == 1;
        uint64_t taken = phase.taken.load();
        while (true) {
            const int32_t front = int32_t(taken), back = int32_t(taken >> 32), left = num_tasks - front - back;
            if (left <= 0) return {0, 0};
            const int32_t number = std::max(left / (kPartsPerThread * num_threads_), 1);
            if (phase.taken.compare_exchange_weak(taken, taken + (uint64_t(number) << (is_from_end ? 32 : 0)))) {
                const int32_t first = is_from_end ? num_tasks - back - number : front;
                return {first, first + number};
            }
        }
    }

    void wait_for(PhaseCounters& phase);

    PhaseCounters* counters_;
    int thread_, num_threads_;
    int phase_ = 0;
};

// Threads that take part in a pass, the caller included.
int num_threads();
void set_num_threads(int number);

// Run a pass of at most kMaxPhases phases. One pass runs at a time; callers queue.
void run_pass(Pass pass, void* context);

// The same for any callable that takes Phases&.
template <class Body>
void run_pass(Body body) {
    run_pass([](void* context, Phases& phases) { (*static_cast<Body*>(context))(phases); }, &body);
}

}  // namespace slipstream
