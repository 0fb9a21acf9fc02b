#include "steps.h"

#include <stdexcept>

#include "spin.h"

namespace omniserve {

Steps::Steps(ThreadPool& pool, std::uint32_t most_steps)
    : pool_(pool),
      most_steps_(most_steps),
      threads_(pool.threads()),
      steps_(std::make_unique<Step[]>(most_steps)),
      shares_(std::make_unique<Share[]>(std::size_t{most_steps} * threads_)) {}

void Steps::add_step(const void* task, Work work, std::uint32_t units) {
  if (count_ == most_steps_) throw std::logic_error("more steps than room for them");
  Step& step = steps_[count_];
  step.done.store(0, std::memory_order_relaxed);
  step.task = task;
  step.work = work;
  step.units = units;
  Share* shares = &shares_[std::size_t{count_} * threads_];
  for (std::uint32_t t = 0; t < threads_; ++t) {
    const auto edge = [&](std::uint32_t n) {
      return static_cast<std::uint32_t>(std::uint64_t{units} * n / threads_);
    };
    shares[t].next.store(edge(t), std::memory_order_relaxed);
    shares[t].end = edge(t + 1);
  }
  ++count_;
}

void Steps::run() {
  workers_.store(0, std::memory_order_relaxed);
  pool_.run([this] { work(); });
  count_ = 0;
}

void Steps::work() {
  const std::uint32_t own = workers_.fetch_add(1, std::memory_order_relaxed);
  for (std::uint32_t s = 0; s < count_; ++s) {
    Step& step = steps_[s];
    take_units(step, &shares_[std::size_t{s} * threads_], own);
    for (int turn = 0; step.done.load(std::memory_order_acquire) != step.units; ++turn)
      wait_a_turn(turn);
  }
}

void Steps::take_units(Step& step, Share* shares, std::uint32_t own) {
  std::uint32_t taken = 0;
  for (std::uint32_t i = 0; i < threads_; ++i) {
    const std::uint32_t thread = (own + i) % threads_;
    Share& share = shares[thread];
    // Looked at first: those behind the end must not grow for ever.
    while (share.next.load(std::memory_order_relaxed) < share.end) {
      const std::uint32_t unit = share.next.fetch_add(1, std::memory_order_relaxed);
      if (unit >= share.end) break;
      step.work(step.task, {unit, unit + 1 == share.end, thread, own, threads_});
      ++taken;
    }
  }
  if (taken != 0) step.done.fetch_add(taken, std::memory_order_acq_rel);
}

}  // namespace omniserve
