#include "server_loop.h"

#include <sched.h>
#include <sys/mman.h>
#include <sys/resource.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <future>

namespace omniserve {
namespace {

constexpr std::int64_t kMaxSleepUs = 100'000;
constexpr int kLeastPriority = 19;

std::int64_t now_us() {
  using namespace std::chrono;
  return duration_cast<microseconds>(steady_clock::now().time_since_epoch()).count();
}

// Moves the calling thread, and those that it starts from now on. Returns why it could not; "" if
// it could. A low priority is less: with each of its time slices it takes a core from a stage of
// the worker, whose other cores then wait for that one.
std::string move_to_background() {
  const sched_param none{};
  if (sched_setscheduler(0, SCHED_IDLE, &none) == 0) return "";
  std::string why = std::strerror(errno);
  setpriority(PRIO_PROCESS, 0, kLeastPriority);
  return why;
}

}  // namespace

ServerLoop::ServerLoop(const std::string& path, const LoopOptions& options)
    : options_(options),
      mapping_(path),
      respond_([this] { respond(); }),
      delays_(options.fault_seed) {
  if (mapping_.size() < shm::kPageAlign) throw std::runtime_error(path + ": too small");
  if (mlock(mapping_.data(), mapping_.size()) != 0) not_locked_ = std::strerror(errno);
  const auto ready = std::make_shared<std::promise<void>>();  // the thread may use it last
  thread_ = std::thread([this, ready] {
    if (options_.background) not_in_background_ = move_to_background();
    if (!options_.cpus.empty()) pin_this_thread(options_.cpus[0]);
    // Helpers inherit the priority.
    threads_ = std::make_unique<ThreadPool>(options_.threads, options_.cpus, options_.spin_us);
    recover();
    ready->set_value();
    run();
  });
  ready->get_future().wait();
}

ServerLoop::~ServerLoop() { stop(); }

void ServerLoop::run() {
  shm::Doorbell& doorbell = header().doorbell;
  while (!stopping_.load()) {
    progress_.fetch_add(1, std::memory_order_relaxed);
    while (visitors_.load() > 0 && !stopping_.load()) std::this_thread::yield();
    if (spin()) continue;
    const std::uint32_t seen = doorbell.value.load(std::memory_order_acquire);
    if (step()) continue;
    if (!wait_bell(doorbell, seen, sleep_us())) check_idle();
  }
}

// Takes what comes within the spinning time; false when there was nothing. It looks at the rings
// and not at the doorbell, whose line the worker then keeps to itself.
bool ServerLoop::spin() {
  if (options_.spin_us <= 0) return false;
  std::int64_t until = 0;
  for (;;) {
    for (int i = 0; i < 64; ++i) {
      if (step()) return true;
      relax_core();
    }
    if (visitors_.load(std::memory_order_relaxed) > 0 || stopping_.load(std::memory_order_relaxed))
      return true;
    const std::int64_t now = now_us();
    if (until == 0) until = now + options_.spin_us;
    if (now >= until) return false;
  }
}

// Takes what is there; false when there was nothing.
bool ServerLoop::step() {
  std::lock_guard lock(mutex_);
  if (!executor_) return false;
  if (!held_.empty()) release_held();
  // At most what a ring holds: a worker that publishes without end must not keep the loop here.
  const std::size_t all = shm::ring_capacity(segment_.geometry().slots);
  if (!take(requests_, all, batch_)) {
    if (take(low_, low_batch_, low_messages_)) {
      // All that was sent before these is there by now: a FREE, it may be, whose pages they need.
      if (take(requests_, all, batch_)) execute();
      std::swap(batch_, low_messages_);
    } else if (!executor_->unfinished()) {
      return false;
    }
  }
  execute();
  checked_ = false;
  return true;
}

// Moves up to `limit` messages from `ring` into `batch`; false when it was empty.
bool ServerLoop::take(RingConsumer& ring, std::size_t limit, std::vector<Message>& batch) {
  entries_.clear();
  batch.clear();
  for (std::uint64_t entry = 0; entries_.size() < limit && ring.pop(entry);) {
    executor_->prefetch(entry);  // its line is in the worker's core; all of them come at once
    entries_.push_back(entry);
  }
  if (entries_.empty()) return false;
  ring.release();
  for (const std::uint64_t entry : entries_)
    if (auto message = executor_->resolve(entry)) batch.push_back(*message);
  return true;
}

void ServerLoop::execute() {
  executor_->run(batch_, answers_, respond_);
  respond();
}

void ServerLoop::respond() {
  for (const std::uint64_t entry : answers_) {
    if (options_.fault_delay_us > 0) {
      const auto delay = static_cast<std::int64_t>(delays_() % (options_.fault_delay_us + 1));
      held_.push({now_us() + delay, entry});
    } else if (!responses_.stage(entry)) {
      ++integrity_errors_;  // the ring holds two entries per slot: the worker corrupted it
    }
  }
  answers_.clear();
  if (responses_.publish() && bell_.data() != nullptr)
    ring_bell(*reinterpret_cast<shm::Doorbell*>(bell_.data()));
}

void ServerLoop::release_held() {
  const std::int64_t now = now_us();
  for (; !held_.empty() && held_.top().due_us <= now; held_.pop())
    if (!responses_.stage(held_.top().entry)) ++integrity_errors_;
  respond();
}

// Called after a sleep in which nothing came, so that no message waits for it.
void ServerLoop::check_idle() {
  std::lock_guard lock(mutex_);
  if (checked_ || !executor_) return;
  checked_ = true;
  std::string wrong = executor_->pages().check_integrity();
  if (wrong.empty() && !(requests_.consistent() && low_.consistent() && responses_.consistent()))
    wrong = "a ring holds more than its capacity";
  if (wrong.empty()) return;
  ++integrity_errors_;
  // Said once: a worker that overwrites our side could fill the log.
  if (!damaged_) std::fprintf(stderr, "cpuattn: integrity check failed: %s\n", wrong.c_str());
  damaged_ = true;
}

std::int64_t ServerLoop::sleep_us() {
  std::lock_guard lock(mutex_);
  if (held_.empty()) return kMaxSleepUs;
  return std::clamp<std::int64_t>(held_.top().due_us - now_us(), 0, kMaxSleepUs);
}

bool ServerLoop::drained() {
  Visit visit(*this);
  return !executor_ ||
         (requests_.empty() && low_.empty() && held_.empty() && !executor_->unfinished());
}

bool ServerLoop::drain(std::int64_t timeout_ms) {
  const std::int64_t until = now_us() + timeout_ms * 1000;
  while (!drained()) {
    if (now_us() >= until) return false;
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  return true;
}

void ServerLoop::stop() {
  if (!thread_.joinable()) return;
  stopping_.store(true);
  ring_bell(header().doorbell);
  thread_.join();
}

ExecutorStats ServerLoop::stats() {
  Visit visit(*this);
  ExecutorStats stats = executor_ ? executor_->stats() : ExecutorStats{};
  stats.errors += integrity_errors_ + requests_.bad_tails() + low_.bad_tails();
  return stats;
}

std::uint32_t ServerLoop::pages_free() {
  Visit visit(*this);
  return executor_ ? executor_->pages().free_pages() : 0;
}

}  // namespace omniserve
