// The worker's side of a segment: submits messages, takes answers; never blocks.
#pragma once

#include <cstdint>
#include <deque>
#include <string>
#include <vector>

#include "ring.h"
#include "segment.h"

namespace omniserve {

// One per (epoch, server). Not thread-safe: the engine's loop owns it.
class WorkerLink {
 public:
  explicit WorkerLink(const std::string& path);

  const SegmentView& segment() const { return segment_; }
  std::uint64_t epoch() const { return epoch_; }
  std::uint64_t segment_id() const { return segment_id_; }
  std::uint32_t outstanding() const { return outstanding_; }
  std::uint64_t ring_waits() const { return ring_waits_; }
  // Whether the segment is still the one that was opened. A server that could not adopt it gives
  // the file to another; this link is then as one to a server that is gone: it answers nothing.
  bool current() const;

  // One message per row, one publication for all. Nothing is sent if any row is refused:
  // std::out_of_range for a slot that does not exist, std::runtime_error for one in use.
  // counts: tokens of each message, or nullptr for 1 each.
  void submit(std::uint32_t kind, const std::int32_t* layers, const std::int32_t* sequences,
              const std::int32_t* positions, const std::int32_t* counts, const std::int32_t* slots,
              std::size_t n);

  // Appends completions since the last call.
  void poll(std::vector<std::int32_t>& slots, std::vector<std::uint8_t>& statuses);

  // Throws std::runtime_error that names the inconsistency.
  void check_integrity() const;

 private:
  struct Side {
    RingProducer ring;
    std::deque<std::uint64_t> kept_back;
  };
  void push(Side& side, std::uint64_t entry);
  bool flush(Side& side);

  Mapping mapping_;
  SegmentView segment_;
  std::uint64_t epoch_ = 0;
  std::uint64_t segment_id_ = 0;
  Side request_;
  Side low_;
  RingConsumer responses_;
  std::vector<std::uint32_t> generation_;  // per slot, of its last message
  std::vector<std::uint8_t> in_use_;       // per slot
  std::uint32_t outstanding_ = 0;
  std::uint64_t ring_waits_ = 0;
};

}  // namespace omniserve
