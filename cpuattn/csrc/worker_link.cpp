#include "worker_link.h"

#include <stdexcept>

namespace omniserve {

WorkerLink::WorkerLink(const std::string& path) : mapping_(Mapping::bare(path)) {
  const shm::Geometry geometry = geometry_of(mapping_, path);
  segment_ = SegmentView(mapping_.data(), geometry);
  const shm::Regions& regions = segment_.regions();
  mapping_.keep(regions.kv);  // KV is the server's: much memory, of which the worker reads none
  epoch_ = segment_.header().epoch;
  segment_id_ = segment_.header().segment_id;
  const std::uint32_t capacity = shm::ring_capacity(geometry.slots);
  request_.ring = RingProducer(segment_.at_offset(regions.request_ring), capacity);
  low_.ring = RingProducer(segment_.at_offset(regions.low_ring), capacity);
  responses_ = RingConsumer(segment_.at_offset(regions.response_ring), capacity);
  const std::uint32_t slots = geometry.slots;
  in_use_.resize(slots, 0);
  generation_.resize(slots);
  for (std::uint32_t s = 0; s < slots; ++s)
    generation_[s] = segment_.slot(s).request_generation.load(std::memory_order_acquire);
}

bool WorkerLink::current() const {
  const shm::Header& header = segment_.header();
  return header.ready.load(std::memory_order_acquire) == 1 && header.epoch == epoch_ &&
         header.segment_id == segment_id_;
}

void WorkerLink::push(Side& side, std::uint64_t entry) {
  // A ring holds two entries per slot, so this only happens if the server misbehaves.
  if (!side.kept_back.empty() || !side.ring.stage(entry)) {
    side.kept_back.push_back(entry);
    ++ring_waits_;
  }
}

bool WorkerLink::flush(Side& side) {
  while (!side.kept_back.empty() && side.ring.stage(side.kept_back.front()))
    side.kept_back.pop_front();
  return side.ring.publish();
}

void WorkerLink::submit(std::uint32_t kind, const std::int32_t* layers,
                        const std::int32_t* sequences, const std::int32_t* positions,
                        const std::int32_t* counts, const std::int32_t* slots, std::size_t n) {
  // Marks slots while it checks, so that a slot named twice is caught too; undone on refusal.
  for (std::size_t i = 0; i < n; ++i) {
    const bool exists = slots[i] >= 0 && static_cast<std::size_t>(slots[i]) < in_use_.size();
    if (exists && !in_use_[slots[i]]) {
      in_use_[slots[i]] = 1;
      // The server wrote there last: all lines come at once instead of one after the other.
      __builtin_prefetch(&segment_.slot(static_cast<std::uint32_t>(slots[i])), 1);
      continue;
    }
    for (std::size_t j = 0; j < i; ++j) in_use_[slots[j]] = 0;
    const std::string name = "slot " + std::to_string(slots[i]);
    if (!exists) throw std::out_of_range(name + " out of range");
    throw std::runtime_error(name + " has an outstanding message");
  }
  outstanding_ += static_cast<std::uint32_t>(n);
  if (!current()) return;
  const bool low = kind == shm::kCheckpoint || kind == shm::kRestore;
  Side& side = low ? low_ : request_;
  for (std::size_t i = 0; i < n; ++i) {
    const std::uint32_t slot = static_cast<std::uint32_t>(slots[i]);
    shm::SlotHeader& header = segment_.slot(slot);
    header.kind = kind;
    header.layer = static_cast<std::uint32_t>(layers[i]);
    header.sequence = static_cast<std::uint32_t>(sequences[i]);
    header.position = static_cast<std::uint32_t>(positions[i]);
    header.count = counts == nullptr ? 1 : static_cast<std::uint32_t>(counts[i]);
    header.request_generation.store(++generation_[slot], std::memory_order_release);
    push(side, shm::ring_entry(slot, generation_[slot]));
  }
  if (flush(side)) ring_bell(segment_.header().doorbell);
}

void WorkerLink::poll(std::vector<std::int32_t>& slots, std::vector<std::uint8_t>& statuses) {
  if (!current()) return;
  if (!request_.kept_back.empty() || !low_.kept_back.empty()) {
    const bool sent = flush(request_);
    if (flush(low_) || sent) ring_bell(segment_.header().doorbell);
  }
  for (std::uint64_t entry = 0; responses_.pop(entry);) {
    const std::uint32_t slot = answer_slot(entry);
    // A restarted server repeats answers that were consumed: their message is not outstanding.
    if (slot >= in_use_.size() || !in_use_[slot] ||
        generation_[slot] != shm::entry_generation(entry))
      continue;
    in_use_[slot] = 0;
    --outstanding_;
    slots.push_back(static_cast<std::int32_t>(slot));
    statuses.push_back(static_cast<std::uint8_t>(answer_status(entry)));
  }
  responses_.release();
}

void WorkerLink::check_integrity() const {
  const auto require = [](bool ok, const std::string& what) {
    if (!ok) throw std::runtime_error("worker link: " + what);
  };
  if (!current()) return;
  require(request_.ring.consistent() && low_.ring.consistent() && responses_.consistent(),
          "a ring holds more than its capacity");
  std::uint32_t in_use = 0;
  for (std::uint32_t s = 0; s < in_use_.size(); ++s) {
    in_use += in_use_[s];
    const shm::SlotHeader& header = segment_.slot(s);
    const std::string name = "slot " + std::to_string(s);
    require(header.request_generation.load(std::memory_order_acquire) == generation_[s],
            name + " was written by someone else");
    require(in_use_[s] || header.done_generation.load(std::memory_order_acquire) == generation_[s],
            name + " is free but its message was never answered");
  }
  require(in_use == outstanding_, "outstanding messages were miscounted");
}

}  // namespace omniserve
