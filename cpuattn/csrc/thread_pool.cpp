#include "thread_pool.h"

#include <pthread.h>
#include <sched.h>

#include <chrono>

#include "spin.h"

namespace omniserve {

void pin_this_thread(int cpu) {
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(cpu, &set);
  pthread_setaffinity_np(pthread_self(), sizeof set, &set);
}

ThreadPool::ThreadPool(unsigned threads, const std::vector<int>& cpus, std::int64_t spin_us)
    : spin_us_(spin_us) {
  for (unsigned i = 1; i < threads; ++i) {
    const int cpu = i < cpus.size() ? cpus[i] : -1;
    helpers_.emplace_back([this, cpu] {
      if (cpu >= 0) pin_this_thread(cpu);
      help();
    });
  }
}

ThreadPool::~ThreadPool() {
  {
    std::lock_guard lock(mutex_);
    stopping_.store(true);
  }
  work_.notify_all();
  for (auto& helper : helpers_) helper.join();
}

// A helper announces itself (inside_), then looks whether the task is open; the caller closes the
// task, then looks whether anybody is inside. Sequential consistency lets one of them see the
// other, so no helper is in a task that has returned.
void ThreadPool::run(const std::function<void()>& task) {
  if (helpers_.empty()) return task();
  task_ = &task;
  open_.store(true);
  tasks_.fetch_add(1);
  if (sleeping_.load() != 0) {
    { std::lock_guard lock(mutex_); }  // a helper between its last look and its sleep
    work_.notify_all();
  }
  task();
  open_.store(false);
  for (int turn = 0; inside_.load() != 0; ++turn) wait_a_turn(turn);
}

void ThreadPool::join_task() {
  inside_.fetch_add(1);
  if (open_.load()) (*task_)();
  inside_.fetch_sub(1);
}

bool ThreadPool::spin_for_task(std::uint32_t seen) const {
  using Clock = std::chrono::steady_clock;
  if (spin_us_ <= 0) return false;
  const auto until = Clock::now() + std::chrono::microseconds(spin_us_);
  do {
    for (int i = 0; i < 64; ++i) {
      if (tasks_.load(std::memory_order_acquire) != seen) return true;
      relax_core();
    }
  } while (Clock::now() < until);
  return false;
}

void ThreadPool::help() {
  std::uint32_t seen = 0;  // a task may be older than this thread
  while (!stopping_.load()) {
    if (!spin_for_task(seen)) {
      std::unique_lock lock(mutex_);
      sleeping_.fetch_add(1);
      work_.wait(lock, [&] { return stopping_.load() || tasks_.load() != seen; });
      sleeping_.fetch_sub(1);
    }
    seen = tasks_.load();
    if (!stopping_.load()) join_task();
  }
}

}  // namespace omniserve
