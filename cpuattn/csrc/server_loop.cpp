#include "server_loop.h"

#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <limits>

namespace omniserve {
namespace {

constexpr std::int64_t kMaxSleepUs = 100'000;
// Rows of the low ring taken at once, so that ATTEND never waits behind many of them.
constexpr std::size_t kLowBatch = 64;

std::int64_t now_us() {
  using namespace std::chrono;
  return duration_cast<microseconds>(steady_clock::now().time_since_epoch()).count();
}

void copy_text(char* to, std::size_t size, const std::string& text) {
  std::memset(to, 0, size);
  std::memcpy(to, text.data(), std::min(text.size(), size - 1));
}

std::string why_not_adoptable(const SegmentView& segment, std::size_t size) {
  const shm::Header& h = segment.header();
  if (h.ready.load(std::memory_order_acquire) != 1) return "no segment in it";
  if (h.magic != shm::kMagic || h.layout_version != shm::kLayoutVersion)
    return "another layout version";
  try {
    check_geometry(h.geometry);
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  const shm::Regions expected = shm::regions_of(h.geometry);
  if (std::memcmp(&expected, &h.regions, sizeof expected) != 0 || expected.end > size ||
      h.ring_capacity != shm::ring_capacity(h.geometry.slots) ||
      h.max_pages_per_sequence != shm::max_pages_per_sequence(h.geometry))
    return "its offsets do not fit its geometry";
  return "";
}

}  // namespace

// Holds mutex_ for a thread other than the loop, soon even when the loop is busy.
class ServerLoop::Visit {
 public:
  explicit Visit(ServerLoop& loop) : loop_(loop) {
    loop_.visitor_.store(true);
    lock_ = std::unique_lock(loop_.mutex_);
  }
  ~Visit() { loop_.visitor_.store(false); }

 private:
  ServerLoop& loop_;
  std::unique_lock<std::mutex> lock_;
};

ServerLoop::ServerLoop(const std::string& path, const LoopOptions& options)
    : options_(options), mapping_(path), delays_(options.fault_seed) {
  if (mapping_.size() < shm::kPageAlign) throw std::runtime_error(path + ": too small");
  segment_ = SegmentView(mapping_.data());
  std::atomic<bool> ready{false};
  thread_ = std::thread([this, &ready] {
    setpriority(PRIO_PROCESS, static_cast<id_t>(syscall(SYS_gettid)), options_.nice);
    if (!options_.cpus.empty()) pin_this_thread(options_.cpus[0]);
    // Helpers inherit the priority.
    threads_ = std::make_unique<ThreadPool>(options_.threads, options_.cpus, options_.spin_us);
    recover();
    ready.store(true);
    run();
  });
  while (!ready.load()) std::this_thread::yield();
}

ServerLoop::~ServerLoop() { stop(); }

void ServerLoop::recover() {
  not_adopted_ = why_not_adoptable(segment_, mapping_.size());
  if (not_adopted_.empty()) {
    try {
      open();
    } catch (const std::runtime_error& error) {  // the page tables contradict one another
      not_adopted_ = error.what();
    }
  }
  if (!not_adopted_.empty()) {
    segment_.header().ready.store(0, std::memory_order_release);
    return;
  }
  try {
    bell_ = Mapping(segment_.header().bell_path);
  } catch (const std::runtime_error& error) {  // the worker is gone; it attaches when it is back
    std::fprintf(stderr, "cpuattn: adopted a segment without its bell: %s\n", error.what());
  }
  requests_.discard();  // what is in them is found again in the slots
  low_.discard();
  for (std::uint32_t s = 0; s < segment_.geometry().slots; ++s) {
    const auto& slot = segment_.slot(s);
    const std::uint32_t done = slot.done_generation.load(std::memory_order_relaxed);
    const std::uint64_t entry = shm::ring_entry(s, done);
    // The answer may never have been published. If it was, the worker drops this one.
    if (done != 0 && done == slot.request_generation.load(std::memory_order_acquire) &&
        !responses_.holds(entry))
      answers_.push_back(entry);
  }
  batch_ = executor_->unanswered();
  execute();
}

void ServerLoop::open() {
  const shm::Header& h = segment_.header();
  executor_.reset();
  executor_ = std::make_unique<Executor>(segment_, *threads_);
  requests_ = Ring(segment_.at_offset(h.regions.request_ring), h.ring_capacity);
  low_ = Ring(segment_.at_offset(h.regions.low_ring), h.ring_capacity);
  responses_ = Ring(segment_.at_offset(h.regions.response_ring), h.ring_capacity);
  checked_ = false;
  attached_.store(true, std::memory_order_release);
}

void ServerLoop::format(const std::string& worker_id, std::uint64_t epoch,
                        std::uint64_t segment_id, const shm::Geometry& geometry,
                        const std::string& bell_path, const std::vector<LayerRules>& layers) {
  check_geometry(geometry);
  if (!layers.empty() && layers.size() != geometry.layers)
    throw std::invalid_argument("layers: one for each layer, or none");
  for (const LayerRules& layer : layers)
    if (!layer.sinks.empty() && layer.sinks.size() != geometry.heads)
      throw std::invalid_argument("sinks: one for each head, or none");
  const shm::Regions regions = shm::regions_of(geometry);
  if (regions.end > mapping_.size()) throw std::invalid_argument("the arena is too small");
  Mapping bell(bell_path);
  if (bell.size() < sizeof(shm::Doorbell)) throw std::runtime_error(bell_path + ": not a bell");
  Visit visit(*this);
  shm::Header& h = segment_.header();
  h.ready.store(0, std::memory_order_seq_cst);
  h.magic = shm::kMagic;
  h.layout_version = shm::kLayoutVersion;
  h.epoch = epoch;
  h.segment_id = segment_id;
  h.arena_bytes = mapping_.size();
  h.geometry = geometry;
  h.ring_capacity = shm::ring_capacity(geometry.slots);
  h.max_pages_per_sequence = shm::max_pages_per_sequence(geometry);
  h.regions = regions;
  copy_text(h.worker_id, sizeof h.worker_id, worker_id);
  copy_text(h.bell_path, sizeof h.bell_path, bell_path);
  // All bookkeeping starts at zero; pages keep what they held, since lengths bound every read.
  std::memset(mapping_.data() + shm::kPageAlign, 0, regions.slab - shm::kPageAlign);
  std::memset(segment_.page_table(0), 0xFF, regions.layer_options - regions.page_table);
  const std::size_t heads = geometry.heads;
  std::fill_n(segment_.sinks(), geometry.layers * heads, -std::numeric_limits<float>::infinity());
  for (std::size_t l = 0; l < layers.size(); ++l) {
    segment_.layer_options()[l] = layers[l].options;
    std::copy(layers[l].sinks.begin(), layers[l].sinks.end(), segment_.sinks() + l * heads);
  }
  held_ = {};
  answers_.clear();
  bell_ = std::move(bell);
  open();
  h.ready.store(1, std::memory_order_release);
}

void ServerLoop::rebell(const std::string& bell_path) {
  Mapping bell(bell_path);
  if (bell.size() < sizeof(shm::Doorbell)) throw std::runtime_error(bell_path + ": not a bell");
  Visit visit(*this);
  copy_text(segment_.header().bell_path, sizeof(shm::Header::bell_path), bell_path);
  bell_ = std::move(bell);
}

void ServerLoop::run() {
  shm::Doorbell& doorbell = segment_.header().doorbell;
  while (!stopping_.load()) {
    progress_.fetch_add(1, std::memory_order_relaxed);
    while (visitor_.load() && !stopping_.load()) std::this_thread::yield();
    const std::uint32_t seen = doorbell.value.load(std::memory_order_acquire);
    if (step()) continue;
    spin(seen);
    wait_bell(doorbell, seen, sleep_us());
  }
}

// Takes what is there; false when there was nothing.
bool ServerLoop::step() {
  std::lock_guard lock(mutex_);
  if (!executor_) return false;
  release_held();
  batch_.clear();
  std::uint64_t entry = 0;
  bool took = false;
  while (requests_.pop(entry)) {
    took = true;
    if (auto message = executor_->resolve(entry)) batch_.push_back(*message);
  }
  if (took) {
    execute();
    checked_ = false;
    return true;
  }
  while (batch_.size() < kLowBatch && low_.pop(entry)) {
    took = true;
    if (auto message = executor_->resolve(entry)) batch_.push_back(*message);
  }
  if (took) {
    execute();
    checked_ = false;
    return true;
  }
  check_idle();
  return false;
}

void ServerLoop::execute() {
  executor_->run(batch_, answers_);
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

void ServerLoop::check_idle() {
  if (checked_) return;
  checked_ = true;
  std::string wrong = executor_->pages().check_integrity();
  if (wrong.empty() && !(requests_.consistent() && low_.consistent() && responses_.consistent()))
    wrong = "a ring holds more than its capacity";
  if (wrong.empty()) return;
  ++integrity_errors_;
  std::fprintf(stderr, "cpuattn: integrity check failed: %s\n", wrong.c_str());
}

std::int64_t ServerLoop::sleep_us() {
  std::lock_guard lock(mutex_);
  if (held_.empty()) return kMaxSleepUs;
  return std::clamp<std::int64_t>(held_.top().due_us - now_us(), 0, kMaxSleepUs);
}

void ServerLoop::spin(std::uint32_t seen) {
  if (options_.spin_us <= 0) return;
  const auto& value = segment_.header().doorbell.value;
  const std::int64_t until = now_us() + options_.spin_us;
  while (value.load(std::memory_order_acquire) == seen && now_us() < until)
    for (int i = 0; i < 64; ++i) {
#if defined(__x86_64__)
      __builtin_ia32_pause();
#endif
    }
}

bool ServerLoop::drained() {
  Visit visit(*this);
  return !executor_ || (requests_.empty() && low_.empty() && held_.empty());
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
  ring_bell(segment_.header().doorbell);
  thread_.join();
}

ExecutorStats ServerLoop::stats() {
  Visit visit(*this);
  ExecutorStats stats = executor_ ? executor_->stats() : ExecutorStats{};
  stats.errors += integrity_errors_;
  return stats;
}

std::uint32_t ServerLoop::pages_free() {
  Visit visit(*this);
  return executor_ ? executor_->pages().free_pages() : 0;
}

}  // namespace omniserve
