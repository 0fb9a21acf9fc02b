// How a server loop comes by its segment: formatted for a worker, or found in the arena at start.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <limits>

#include "server_loop.h"

namespace omniserve {
namespace {

constexpr std::size_t kLowBatchBytes = 1 << 20;
constexpr std::size_t kLowBatchMin = 64;

void copy_text(char* to, std::size_t size, const std::string& text) {
  std::memset(to, 0, size);
  std::memcpy(to, text.data(), std::min(text.size(), size - 1));
}

// Of a field that need not end in a zero.
template <std::size_t size>
std::string read_text(const char (&from)[size]) {
  return std::string(from, strnlen(from, size));
}

Mapping map_bell(const std::string& path) {
  Mapping bell(path);
  // Exactly: the loop counts in its first word, so nothing but a bell may be taken for one.
  if (bell.size() != sizeof(shm::Doorbell)) throw std::runtime_error(path + ": not a bell");
  return bell;
}

bool printable(const std::string& text) {
  return std::all_of(text.begin(), text.end(), [](char c) { return c >= ' ' && c <= '~'; });
}

std::string why_not_adoptable(const shm::Header& h, const shm::Geometry& geometry,
                              const std::string& worker_id, std::size_t size) {
  if (h.ready.load(std::memory_order_acquire) != 1) return "no segment in it";
  if (h.magic != shm::kMagic || h.layout_version != shm::kLayoutVersion)
    return "another layout version";
  try {
    check_geometry(geometry);
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  const shm::Regions expected = shm::regions_of(geometry);
  if (std::memcmp(&expected, &h.regions, sizeof expected) != 0 ||
      !shm::fits(geometry, size) ||
      h.ring_capacity != shm::ring_capacity(geometry.slots) ||
      h.max_pages_per_sequence != shm::max_pages_per_sequence(geometry))
    return "its offsets do not fit its geometry";
  if (worker_id.empty() || worker_id.size() == sizeof h.worker_id || !printable(worker_id))
    return "its worker's name is damaged";
  return "";
}

// Moves those out of `messages`, sorted by sequence, whose sequence has no other message there.
// They run first: the worker counts on their pages as soon as it has sent them, and messages of
// other sequences may need these. Any other FREE comes behind what is asked of its sequence.
std::vector<Message> take_lone_frees(std::vector<Message>& messages) {
  std::vector<Message> frees, others;
  for (std::size_t i = 0; i < messages.size(); ++i) {
    const auto same = [&](std::size_t other) {
      return other < messages.size() && messages[other].sequence == messages[i].sequence;
    };
    const bool lone = messages[i].kind == shm::kFree && !same(i - 1) && !same(i + 1);
    (lone ? frees : others).push_back(messages[i]);
  }
  messages = std::move(others);
  return frees;
}

}  // namespace

void ServerLoop::recover() {
  shm::Header& h = header();
  const shm::Geometry geometry = h.geometry;
  const Owner owner{read_text(h.worker_id), h.epoch, h.segment_id};
  not_adopted_ = why_not_adoptable(h, geometry, owner.worker_id, mapping_.size());
  if (not_adopted_.empty()) {
    try {
      open(geometry);
    } catch (const std::exception& error) {  // its page tables contradict one another, or no memory
      executor_.reset();
      attached_.store(false, std::memory_order_release);
      not_adopted_ = error.what();
    }
  }
  if (!not_adopted_.empty()) {
    h.ready.store(0, std::memory_order_release);
    return;
  }
  owner_ = owner;
  try {
    bell_ = map_bell(read_text(h.bell_path));
  } catch (const std::exception& error) {  // the worker is gone; it attaches when it is back
    std::fprintf(stderr, "cpuattn: adopted a segment without its bell: %s\n", error.what());
  }
  requests_.discard();  // what is in them is found again in the slots
  low_.discard();
  std::vector<std::uint64_t> waiting(segment_.geometry().slots, 0);  // a slot's last answer
  responses_.for_each([&](std::uint64_t entry) {
    if (answer_slot(entry) < waiting.size()) waiting[answer_slot(entry)] = entry;
  });
  for (std::uint32_t s = 0; s < segment_.geometry().slots; ++s) {
    const auto& slot = segment_.slot(s);
    const std::uint32_t done = slot.done_generation.load(std::memory_order_relaxed);
    const std::uint64_t entry = answer_entry(s, done, slot.status);
    // The answer may never have been published. If it was, the worker drops this one.
    if (done != 0 && done == slot.request_generation.load(std::memory_order_acquire) &&
        waiting[s] != entry)
      answers_.push_back(entry);
  }
  std::vector<Message> found = executor_->unanswered();
  batch_ = take_lone_frees(found);
  execute();
  batch_ = std::move(found);
  execute();
  // The server may have been killed between an answer's publication and the bell.
  if (bell_.data() != nullptr) ring_bell(*reinterpret_cast<shm::Doorbell*>(bell_.data()));
}

std::size_t ServerLoop::low_batch(const shm::Geometry& g) {
  const std::size_t token_bytes = 2ULL * g.kv_heads * g.head_dim * shm::dtype_bytes(g.dtype);
  return std::max(kLowBatchMin, kLowBatchBytes / token_bytes);
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
  low_batch_ = low_batch(geometry);
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
  if (!shm::fits(geometry, mapping_.size()))
    throw std::invalid_argument("the arena is too small");
  Mapping bell = map_bell(bell_path);
  Visit visit(*this);
  shm::Header& h = header();
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
  copy_text(header().bell_path, sizeof(shm::Header::bell_path), bell_path);
  bell_ = std::move(bell);
}

}  // namespace omniserve
