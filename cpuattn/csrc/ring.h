// The two sides of a single-producer, single-consumer ring of entries in shared memory.
//
// Each side keeps its own index, and what it last saw of the other's, in its own memory. So a line
// of the ring's header changes cores once per publication and not once per entry, and whatever the
// other side writes into the ring cannot move this side's index: an index of the other side is
// believed only while it makes the ring hold no more than its capacity.
#pragma once

#include <cstddef>
#include <cstdint>

#include "omniserve/shm/layout.h"

namespace omniserve {

// An entry of the response ring carries the status too, which spares the worker a line of the slot's
// header: slots need 20 bits of the lower 32.
constexpr std::uint64_t answer_entry(std::uint32_t slot, std::uint32_t generation,
                                     std::uint32_t status) {
  return shm::ring_entry((status & 0xFF) << 24 | slot, generation);
}
constexpr std::uint32_t answer_slot(std::uint64_t entry) {
  return shm::entry_slot(entry) & 0xFFFFFF;
}
constexpr std::uint32_t answer_status(std::uint64_t entry) { return shm::entry_slot(entry) >> 24; }

// What both sides know of a ring. Indices count entries ever moved, and wrap at 2^64.
class RingMemory {
 public:
  RingMemory() = default;
  // capacity: a power of two.
  RingMemory(std::byte* base, std::uint32_t capacity)
      : header_(reinterpret_cast<shm::RingHeader*>(base)),
        entries_(reinterpret_cast<std::atomic<std::uint64_t>*>(base + sizeof(shm::RingHeader))),
        capacity_(capacity) {}

  bool consistent() const {
    const std::uint64_t head = header_->head.load(std::memory_order_acquire);
    const std::uint64_t tail = header_->tail.load(std::memory_order_acquire);
    return tail - head <= capacity_;
  }

 protected:
  // Relaxed, for the indices order them; atomic, for a hostile side may write one while it is read.
  std::uint64_t load(std::uint64_t index) const {
    return entries_[index & (capacity_ - 1)].load(std::memory_order_relaxed);
  }
  void prefetch(std::uint64_t index) const {
    __builtin_prefetch(&entries_[index & (capacity_ - 1)]);
  }
  void store(std::uint64_t index, std::uint64_t entry) {
    entries_[index & (capacity_ - 1)].store(entry, std::memory_order_relaxed);
  }

  shm::RingHeader* header_ = nullptr;
  std::atomic<std::uint64_t>* entries_ = nullptr;
  std::uint64_t capacity_ = 0;
};

class RingProducer : public RingMemory {
 public:
  RingProducer() = default;
  RingProducer(std::byte* base, std::uint32_t capacity) : RingMemory(base, capacity) {
    head_ = header_->head.load(std::memory_order_acquire);
    published_ = header_->tail.load(std::memory_order_relaxed);
    // Only where someone else wrote the indices: whatever was in the ring is lost then.
    if (published_ - head_ > capacity_) published_ = head_;
    staged_ = published_;
  }

  // Puts an entry behind the published ones; false when full.
  bool stage(std::uint64_t entry) {
    if (staged_ - head_ >= capacity_ && !make_room()) return false;
    store(staged_, entry);
    ++staged_;
    return true;
  }
  // Makes the staged entries visible; returns whether there were any.
  bool publish() {
    if (staged_ == published_) return false;
    header_->tail.store(staged_, std::memory_order_release);
    published_ = staged_;
    return true;
  }
  // Calls visit(entry) for each entry that waits to be consumed, the oldest first. The consumer may
  // take them meanwhile.
  template <typename Visit>
  void for_each(Visit visit) const {
    std::uint64_t i = header_->head.load(std::memory_order_acquire);
    if (published_ - i > capacity_) return;
    for (; i != published_; ++i) visit(load(i));
  }

 private:
  bool make_room() {
    const std::uint64_t head = header_->head.load(std::memory_order_acquire);
    // Beyond both ends: a consumer can neither go back nor overtake what was published.
    if (head - head_ > published_ - head_) return false;
    head_ = head;
    return staged_ - head_ < capacity_;
  }

  std::uint64_t staged_ = 0;
  std::uint64_t published_ = 0;
  std::uint64_t head_ = 0;  // the consumer's, when last looked at
};

class RingConsumer : public RingMemory {
 public:
  RingConsumer() = default;
  RingConsumer(std::byte* base, std::uint32_t capacity)
      : RingMemory(base, capacity),
        head_(header_->head.load(std::memory_order_relaxed)),
        tail_(head_),
        released_(head_) {}

  // False when empty.
  bool pop(std::uint64_t& entry) {
    if (head_ == tail_ && !look()) return false;
    entry = load(head_++);
    return true;
  }
  // Gives the places of popped entries back to the producer.
  void release() {
    if (head_ == released_) return;
    header_->head.store(head_, std::memory_order_release);
    released_ = head_;
  }
  bool empty() { return head_ == tail_ && !look(); }
  // Drops what was published.
  void discard() {
    head_ = tail_ = header_->tail.load(std::memory_order_acquire);
    release();
  }
  // Tails that no producer can have published. They are ignored, and mend when it publishes again.
  std::uint64_t bad_tails() const { return bad_tails_; }

 private:
  // Whether something was published behind what has been popped.
  bool look() {
    prefetch(head_);  // so that the entry comes with the tail and not after it
    const std::uint64_t tail = header_->tail.load(std::memory_order_acquire);
    if (tail == tail_) return false;
    if (tail - head_ > capacity_) {
      if (tail != last_bad_) ++bad_tails_;
      last_bad_ = tail;
      return false;
    }
    tail_ = tail;
    return true;
  }

  std::uint64_t head_ = 0;
  std::uint64_t tail_ = 0;  // the producer's, when last looked at
  std::uint64_t released_ = 0;
  std::uint64_t last_bad_ = 0;
  std::uint64_t bad_tails_ = 0;
};

}  // namespace omniserve
