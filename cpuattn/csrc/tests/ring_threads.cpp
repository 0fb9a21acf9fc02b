// Two threads over a request ring, a response ring and slots, as a worker and a server use them.
// Run under ThreadSanitizer: slots are plain memory, so only the rings order who touches them.
#include <cstdint>
#include <thread>
#include <vector>

#include "check.h"
#include "ring.h"
#include "segment.h"

using namespace omniserve;

namespace {

constexpr std::uint32_t kCapacity = 64;
constexpr std::uint32_t kSlots = 31;
constexpr std::int64_t kPatienceUs = 60'000'000;

struct alignas(64) RingStorage {
  shm::RingHeader header;
  std::atomic<std::uint64_t> entries[kCapacity];
  std::byte* base() { return reinterpret_cast<std::byte*>(this); }
};

struct Shared {
  RingStorage requests{};
  RingStorage responses{};
  shm::Doorbell to_server{};
  shm::Doorbell to_worker{};
  std::uint64_t slots[kSlots] = {};  // plain: the rings must order them
};

// Returns when the other side has published something into `ring`.
void wait(RingConsumer& ring, shm::Doorbell& bell, bool sleeps) {
  for (;;) {
    const std::uint32_t seen = bell.value.load(std::memory_order_acquire);
    if (!ring.empty()) return;
    if (sleeps) CHECK(wait_bell(bell, seen, kPatienceUs), "a wake-up was lost");
    else std::this_thread::yield();
  }
}

// Answers every message with its double, in slots; ends after `messages`.
void serve(Shared& shared, std::uint64_t messages, bool sleeps) {
  RingConsumer requests(shared.requests.base(), kCapacity);
  RingProducer responses(shared.responses.base(), kCapacity);
  for (std::uint64_t done = 0; done < messages;) {
    wait(requests, shared.to_server, sleeps);
    for (std::uint64_t entry = 0; requests.pop(entry); ++done) {
      CHECK(shm::entry_generation(entry) == static_cast<std::uint32_t>(done), "out of order");
      shared.slots[shm::entry_slot(entry)] *= 2;
      CHECK(responses.stage(entry), "credits did not keep the response ring from filling");
    }
    requests.release();
    if (responses.publish()) ring_bell(shared.to_worker);
  }
}

void run(std::uint64_t messages, bool sleeps) {
  Shared shared;
  std::thread server([&] { serve(shared, messages, sleeps); });
  RingProducer requests(shared.requests.base(), kCapacity);
  RingConsumer responses(shared.responses.base(), kCapacity);
  std::vector<std::uint32_t> free;
  for (std::uint32_t s = 0; s < kSlots; ++s) free.push_back(s);
  std::uint64_t sent = 0;
  std::uint64_t received = 0;
  while (received < messages) {
    // Batches of changing size, so that the rings wrap at every place.
    for (std::uint64_t n = 1 + sent % 7; n > 0 && sent < messages && !free.empty(); --n, ++sent) {
      shared.slots[free.back()] = sent;
      CHECK(requests.stage(shm::ring_entry(free.back(), static_cast<std::uint32_t>(sent))), "full");
      free.pop_back();
    }
    if (requests.publish()) ring_bell(shared.to_server);
    if (free.empty() || sent == messages) wait(responses, shared.to_worker, sleeps);
    for (std::uint64_t entry = 0; responses.pop(entry); ++received) {
      const std::uint32_t slot = shm::entry_slot(entry);
      CHECK(shm::entry_generation(entry) == static_cast<std::uint32_t>(received), "out of order");
      CHECK(shared.slots[slot] == 2 * received, "the wrong content");
      free.insert(free.begin(), slot);
    }
    responses.release();
  }
  server.join();
}

}  // namespace

int main() {
  run(5'000'000, false);
  run(300'000, true);
  return 0;
}
