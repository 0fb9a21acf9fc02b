#include "thread_pool.h"

#include <pthread.h>
#include <sched.h>

namespace omniserve {

void pin_this_thread(int cpu) {
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(cpu, &set);
  pthread_setaffinity_np(pthread_self(), sizeof set, &set);
}

ThreadPool::ThreadPool(unsigned threads, const std::vector<int>& cpus) {
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
    stopping_ = true;
  }
  work_.notify_all();
  for (auto& helper : helpers_) helper.join();
}

void ThreadPool::take(const std::function<void(std::uint32_t)>& task, std::uint32_t count) {
  for (std::uint32_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < count;) task(i);
}

void ThreadPool::run(std::uint32_t count, const std::function<void(std::uint32_t)>& task) {
  if (helpers_.empty() || count < 2) {
    for (std::uint32_t i = 0; i < count; ++i) task(i);
    return;
  }
  {
    std::lock_guard lock(mutex_);
    task_ = &task;
    count_ = count;
    next_.store(0, std::memory_order_relaxed);
    busy_ = static_cast<unsigned>(helpers_.size());
    ++job_;
  }
  work_.notify_all();
  take(task, count);
  std::unique_lock lock(mutex_);
  done_.wait(lock, [this] { return busy_ == 0; });
}

void ThreadPool::help() {
  std::uint64_t seen = 0;
  std::unique_lock lock(mutex_);
  for (;;) {
    work_.wait(lock, [&] { return stopping_ || job_ != seen; });
    if (stopping_) return;
    seen = job_;
    const auto* task = task_;
    const std::uint32_t count = count_;
    lock.unlock();
    take(*task, count);
    lock.lock();
    if (--busy_ == 0) done_.notify_one();
  }
}

}  // namespace omniserve
