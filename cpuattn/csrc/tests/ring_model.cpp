// A seeded model check of the ring's index arithmetic: random operations against a deque, with
// indices that start just below where they wrap.
#include <cstdint>
#include <deque>
#include <memory>
#include <random>
#include <vector>

#include "check.h"
#include "ring.h"

using namespace omniserve;

namespace {

class Model {
 public:
  Model(std::uint64_t seed, std::uint32_t capacity, std::uint64_t start)
      : seed_(seed), random_(seed), capacity_(capacity), memory_(16 + capacity) {
    header().head.store(start);
    header().tail.store(start);
    producer_ = RingProducer(base(), capacity);
    consumer_ = RingConsumer(base(), capacity);
  }

  void run(int steps) {
    for (int i = 0; i < steps; ++i) step();
  }

 private:
  std::byte* base() { return reinterpret_cast<std::byte*>(memory_.data()); }
  shm::RingHeader& header() { return *reinterpret_cast<shm::RingHeader*>(base()); }
  std::uint64_t below(std::uint64_t n) { return random_() % n; }

  void step() {
    switch (below(16)) {
      case 0: return discard();
      case 1: return for_each();
      case 2: return restart_producer();
      case 3: return restart_consumer();
      case 4: return corrupt_tail();
      case 5: return corrupt_head();
      case 6: case 7: return publish();
      case 8: case 9: return release();
      case 10: case 11: case 12: return pop();
      default: return stage();
    }
  }

  void stage() {
    const bool room = kept_.size() + published_.size() + staged_.size() < capacity_;
    CHECK(producer_.stage(next_) == room, "seed %lu", seed_);
    if (room) staged_.push_back(next_);
    ++next_;
  }
  void publish() {
    CHECK(producer_.publish() == !staged_.empty(), "seed %lu", seed_);
    published_.insert(published_.end(), staged_.begin(), staged_.end());
    staged_.clear();
    CHECK(producer_.consistent() && consumer_.consistent(), "seed %lu", seed_);
  }
  void pop() {
    CHECK(consumer_.empty() == published_.empty(), "seed %lu", seed_);
    std::uint64_t entry = 0;
    CHECK(consumer_.pop(entry) == !published_.empty(), "seed %lu", seed_);
    if (published_.empty()) return;
    CHECK(entry == published_.front(), "seed %lu: %lu", seed_, entry);
    kept_.push_back(entry);
    published_.pop_front();
  }
  void release() {
    consumer_.release();
    kept_.clear();
  }
  void discard() {
    consumer_.discard();
    kept_.clear();
    published_.clear();
  }
  void for_each() {
    std::deque<std::uint64_t> waiting = kept_, found;
    waiting.insert(waiting.end(), published_.begin(), published_.end());
    producer_.for_each([&](std::uint64_t entry) { found.push_back(entry); });
    CHECK(found == waiting, "seed %lu", seed_);
  }
  // A side that starts again knows what was published and released, and no more.
  void restart_producer() {
    producer_ = RingProducer(base(), capacity_);
    staged_.clear();
  }
  void restart_consumer() {
    consumer_ = RingConsumer(base(), capacity_);
    published_.insert(published_.begin(), kept_.begin(), kept_.end());
    kept_.clear();
  }
  void corrupt_tail() {
    while (!published_.empty()) pop();
    const std::uint64_t right = header().tail.load();
    const std::uint64_t seen = consumer_.bad_tails();
    // From just beyond what the ring can hold to just behind what was consumed.
    const std::uint64_t popped = right;
    header().tail.store(popped + capacity_ + 1 + below(~std::uint64_t{0} - capacity_ - 1));
    std::uint64_t entry = 0;
    CHECK(!consumer_.pop(entry) && consumer_.empty(), "seed %lu", seed_);
    CHECK(consumer_.bad_tails() == seen + 1, "seed %lu", seed_);
    header().tail.store(right);
    CHECK(!consumer_.pop(entry), "seed %lu", seed_);
  }
  void corrupt_head() {
    const std::uint64_t right = header().head.load();
    const std::uint64_t published = header().tail.load();
    header().head.store(published + 1 + below(~(published - right)));
    const std::uint64_t entry = next_++;
    // It may or may not know of room from before, but never takes more than the ring holds.
    if (producer_.stage(entry)) staged_.push_back(entry);
    CHECK(kept_.size() + published_.size() + staged_.size() <= capacity_, "seed %lu", seed_);
    producer_.for_each([](std::uint64_t) {});
    header().head.store(right);
  }

  const std::uint64_t seed_;
  std::mt19937_64 random_;
  const std::uint32_t capacity_;
  std::vector<std::uint64_t> memory_;
  RingProducer producer_;
  RingConsumer consumer_;
  std::uint64_t next_ = 1;
  std::deque<std::uint64_t> kept_;       // popped and not released
  std::deque<std::uint64_t> published_;  // behind them
  std::deque<std::uint64_t> staged_;     // behind them
};

}  // namespace

int main() {
  std::uint64_t seed = 1;
  for (std::uint32_t capacity = 2; capacity <= 64; capacity *= 2)
    for (const std::uint64_t wrap : {std::uint64_t{0}, std::uint64_t{1} << 32})
      for (std::uint64_t before = 0; before <= 2 * capacity; ++before, ++seed)
        Model(seed, capacity, wrap - before).run(4000);
  return 0;
}
