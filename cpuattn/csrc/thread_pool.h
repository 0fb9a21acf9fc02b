// A few persistent threads that share the index range of one job at a time with its caller.
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
  // `threads` counts the caller. `cpus`, if not empty, pins helper i to cpus[i].
  explicit ThreadPool(unsigned threads, const std::vector<int>& cpus = {});
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  unsigned threads() const { return static_cast<unsigned>(helpers_.size()) + 1; }

  // Calls task(i) for every i below `count`; returns when all are done. One caller at a time.
  void run(std::uint32_t count, const std::function<void(std::uint32_t)>& task);

 private:
  void help();
  void take(const std::function<void(std::uint32_t)>& task, std::uint32_t count);

  std::vector<std::thread> helpers_;
  std::mutex mutex_;
  std::condition_variable work_;
  std::condition_variable done_;
  const std::function<void(std::uint32_t)>* task_ = nullptr;
  std::uint32_t count_ = 0;
  std::uint64_t job_ = 0;
  unsigned busy_ = 0;
  bool stopping_ = false;
  std::atomic<std::uint32_t> next_{0};
};

// Pins the calling thread; a CPU that may not be used is ignored.
void pin_this_thread(int cpu);

}  // namespace omniserve
