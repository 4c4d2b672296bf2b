// Threads that share the work of one forward pass.
//
// A pass is a sequence of phases, a phase a number of tasks. Threads take tasks from a counter, so who computes what is
// left to chance; results are not, because every output is computed by one task in a fixed order. A phase is over when
// all its tasks are done, not when all threads have arrived: a thread that the system has not scheduled yet delays
// nobody, and joins in whatever phase it finds.
#pragma once

#include <atomic>
#include <cstdint>

namespace slipstream {

constexpr int kMaxPhases = 4096;

class Phases;

// The body of a pass: called once by every thread that takes part, each going through the same phases.
using Pass = void (*)(void* context, Phases& phases);

struct PhaseCounters {
    alignas(64) std::atomic<int32_t> next{0};
    alignas(64) std::atomic<int32_t> done{0};
};

// One thread's walk through the phases of a pass.
class Phases {
   public:
    Phases(PhaseCounters* counters, int thread) : counters_(counters), thread_(thread) {}

    int thread() const { return thread_; }
    int num_run() const { return phase_; }

    // Run `task(index)` for every index below `num_tasks`, and return when all of them are done. `finish` runs once,
    // after the last task and before any thread goes on.
    template <class Task, class Finish>
    void run(int num_tasks, Task task, Finish finish) {
        PhaseCounters& phase = counters_[phase_++];
        for (int index = phase.next.fetch_add(1); index < num_tasks; index = phase.next.fetch_add(1)) {
            task(index);
            if (phase.done.fetch_add(1) + 1 == num_tasks) {
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

    void wait_for(PhaseCounters& phase);

    PhaseCounters* counters_;
    int thread_;
    int phase_ = 0;
};

// Threads that take part in a pass, the caller included.
int num_threads();
void set_num_threads(int number);

// Run a pass of at most kMaxPhases phases. One pass runs at a time; callers queue.
void run_pass(Pass pass, void* context);

}  // namespace slipstream
