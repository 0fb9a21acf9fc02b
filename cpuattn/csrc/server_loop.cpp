#include "server_loop.h"

#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
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

// Of a field that need not end in a zero.
template <std::size_t size>
std::string read_text(const char (&from)[size]) {
  return std::string(from, strnlen(from, size));
}

shm::Header& header_in(const Mapping& mapping) {
  return *reinterpret_cast<shm::Header*>(mapping.data());
}

Mapping map_bell(const std::string& path) {
  Mapping bell(path);
  // Exactly: the loop counts in its first word, so nothing but a bell may be taken for one.
  if (bell.size() != sizeof(shm::Doorbell)) throw std::runtime_error(path + ": not a bell");
  return bell;
}

std::string why_not_adoptable(const shm::Header& h, const shm::Geometry& geometry,
                              std::size_t size) {
  if (h.ready.load(std::memory_order_acquire) != 1) return "no segment in it";
  if (h.magic != shm::kMagic || h.layout_version != shm::kLayoutVersion)
    return "another layout version";
  try {
    check_geometry(geometry);
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  const shm::Regions expected = shm::regions_of(geometry);
  if (std::memcmp(&expected, &h.regions, sizeof expected) != 0 || expected.end > size ||
      h.ring_capacity != shm::ring_capacity(geometry.slots) ||
      h.max_pages_per_sequence != shm::max_pages_per_sequence(geometry))
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
    : options_(options),
      mapping_(path),
      respond_([this] { respond(); }),
      delays_(options.fault_seed) {
  if (mapping_.size() < shm::kPageAlign) throw std::runtime_error(path + ": too small");
  if (mlock(mapping_.data(), mapping_.size()) != 0) not_locked_ = std::strerror(errno);
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
  shm::Header& h = header_in(mapping_);
  const shm::Geometry geometry = h.geometry;
  not_adopted_ = why_not_adoptable(h, geometry, mapping_.size());
  if (not_adopted_.empty()) {
    try {
      open(geometry);
    } catch (const std::runtime_error& error) {  // the page tables contradict one another
      not_adopted_ = error.what();
    }
  }
  if (!not_adopted_.empty()) {
    h.ready.store(0, std::memory_order_release);
    return;
  }
  owner_ = {read_text(h.worker_id), h.epoch, h.segment_id};
  try {
    bell_ = map_bell(read_text(h.bell_path));
  } catch (const std::runtime_error& error) {  // the worker is gone; it attaches when it is back
    std::fprintf(stderr, "cpuattn: adopted a segment without its bell: %s\n", error.what());
  }
  requests_.discard();  // what is in them is found again in the slots
  low_.discard();
  for (std::uint32_t s = 0; s < segment_.geometry().slots; ++s) {
    const auto& slot = segment_.slot(s);
    const std::uint32_t done = slot.done_generation.load(std::memory_order_relaxed);
    const std::uint64_t entry = answer_entry(s, done, slot.status);
    // The answer may never have been published. If it was, the worker drops this one.
    if (done != 0 && done == slot.request_generation.load(std::memory_order_acquire) &&
        !responses_.holds(entry))
      answers_.push_back(entry);
  }
  batch_ = executor_->unanswered();
  execute();
}

void ServerLoop::open(const shm::Geometry& geometry) {
  executor_.reset();
  segment_ = SegmentView(mapping_.data(), geometry);
  const shm::Regions& regions = segment_.regions();
  const std::uint32_t capacity = shm::ring_capacity(geometry.slots);
  executor_ = std::make_unique<Executor>(segment_, *threads_);
  requests_ = RingConsumer(segment_.at_offset(regions.request_ring), capacity);
  low_ = RingConsumer(segment_.at_offset(regions.low_ring), capacity);
  responses_ = RingProducer(segment_.at_offset(regions.response_ring), capacity);
  entries_.reserve(capacity);
  checked_ = false;
  damaged_ = false;
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
  Mapping bell = map_bell(bell_path);
  Visit visit(*this);
  shm::Header& h = header_in(mapping_);
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
  const SegmentView segment(mapping_.data(), geometry);
  std::memset(segment.page_table(0), 0xFF,
              4ULL * geometry.max_sequences * h.max_pages_per_sequence);
  const std::size_t heads = geometry.heads;
  std::fill_n(segment.sinks(), geometry.layers * heads, -std::numeric_limits<float>::infinity());
  for (std::size_t l = 0; l < layers.size(); ++l) {
    segment.layer_options()[l] = layers[l].options;
    std::copy(layers[l].sinks.begin(), layers[l].sinks.end(), segment.sinks() + l * heads);
  }
  held_ = {};
  answers_.clear();
  bell_ = std::move(bell);
  open(geometry);
  owner_ = {worker_id, epoch, segment_id};
  h.ready.store(1, std::memory_order_release);
}

void ServerLoop::rebell(const std::string& bell_path) {
  Mapping bell = map_bell(bell_path);
  Visit visit(*this);
  copy_text(header_in(mapping_).bell_path, sizeof(shm::Header::bell_path), bell_path);
  bell_ = std::move(bell);
}

void ServerLoop::run() {
  shm::Doorbell& doorbell = header_in(mapping_).doorbell;
  while (!stopping_.load()) {
    progress_.fetch_add(1, std::memory_order_relaxed);
    while (visitor_.load() && !stopping_.load()) std::this_thread::yield();
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
    if (visitor_.load(std::memory_order_relaxed) || stopping_.load(std::memory_order_relaxed))
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
  if (!take(requests_, all) && !take(low_, kLowBatch)) return false;
  execute();
  checked_ = false;
  return true;
}

// Moves up to `limit` messages from `ring` into batch_; false when it was empty.
bool ServerLoop::take(RingConsumer& ring, std::size_t limit) {
  entries_.clear();
  batch_.clear();
  for (std::uint64_t entry = 0; entries_.size() < limit && ring.pop(entry);) {
    executor_->prefetch(entry);  // its line is in the worker's core; all of them come at once
    entries_.push_back(entry);
  }
  if (entries_.empty()) return false;
  ring.release();
  for (const std::uint64_t entry : entries_)
    if (auto message = executor_->resolve(entry)) batch_.push_back(*message);
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
  ring_bell(header_in(mapping_).doorbell);
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
