// A few persistent threads that join their caller in one task at a time.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace omniserve {

class ThreadPool {
 public:
  // `threads` counts the caller. `cpus`, if not empty, pins helper i to cpus[i]. Helpers look for
  // the next task for `spin_us` before they sleep; 0 where cores are shared.
  explicit ThreadPool(unsigned threads, const std::vector<int>& cpus = {},
                      std::int64_t spin_us = 0);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  unsigned threads() const { return static_cast<unsigned>(helpers_.size()) + 1; }
  // Whether a task of a few microseconds is worth sharing.
  bool spins() const { return spin_us_ > 0; }

  // Runs `task` here and in every helper that comes in time; the task divides its work itself.
  // Returns when no thread is in it. A helper that sleeps through it costs no wait. One caller at
  // a time; tasks must not throw.
  void run(const std::function<void()>& task);

 private:
  void help();
  void join_task();
  bool spin_for_task(std::uint32_t seen) const;

  std::vector<std::thread> helpers_;
  std::int64_t spin_us_;
  const std::function<void()>* task_ = nullptr;
  std::atomic<bool> open_{false};  // whether helpers may enter the task
  std::atomic<std::uint32_t> inside_{0};
  std::atomic<std::uint32_t> tasks_{0};  // ever published
  std::atomic<std::uint32_t> sleeping_{0};
  std::atomic<bool> stopping_{false};
  std::mutex mutex_;  // for sleeping only
  std::condition_variable work_;
};

// Pins the calling thread; a CPU that may not be used is ignored.
void pin_this_thread(int cpu);

}  // namespace omniserve
