// Steps that follow one another, each cut into units that the threads of a pool take.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>

#include "thread_pool.h"

namespace omniserve {

// A unit of a step, and where its thread goes on: work is told what to fetch meanwhile.
struct Turn {
  std::uint32_t unit;
  bool last;             // of its thread's share; the next unit is unit + 1 otherwise
  std::uint32_t thread;  // whose share it is
  std::uint32_t worker;  // which thread runs it
  std::uint32_t threads;

  // First unit of the thread's share of another step.
  std::uint32_t first_of(std::uint32_t units) const {
    return static_cast<std::uint32_t>(std::uint64_t{units} * thread / threads);
  }
};

// No barrier: a thread that comes late finds the steps before it done, and one that is kept from
// running holds up the others by the unit that it is in. Neighbouring units are one thread's share,
// so that it reads memory on where it stopped; when it has done them it takes those of others.
// Not thread-safe: one caller at a time.
class Steps {
 public:
  Steps(ThreadPool& pool, std::uint32_t most_steps);

  // `task->run(turn)` for every unit, after all units of the steps before it. `task` must live
  // until run() has returned. At most `most_steps` steps.
  template <typename Task>
  void add(const Task& task, std::uint32_t units) {
    add_step(&task, [](const void* t, const Turn& turn) { static_cast<const Task*>(t)->run(turn); },
             units);
  }
  // Carries out the steps added since it was last called.
  void run();

 private:
  using Work = void (*)(const void* task, const Turn& turn);
  struct alignas(64) Share {
    std::atomic<std::uint32_t> next;
    std::uint32_t end;
  };
  struct alignas(64) Step {
    std::atomic<std::uint32_t> done;
    const void* task;
    Work work;
    std::uint32_t units;
  };

  void add_step(const void* task, Work work, std::uint32_t units);
  void work();
  void take_units(Step& step, Share* shares, std::uint32_t own);

  ThreadPool& pool_;
  std::uint32_t most_steps_;
  std::uint32_t threads_;
  std::uint32_t count_ = 0;
  std::unique_ptr<Step[]> steps_;
  std::unique_ptr<Share[]> shares_;  // [most_steps][threads]
  std::atomic<std::uint32_t> workers_{0};
};

}  // namespace omniserve
