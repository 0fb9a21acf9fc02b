// A worker that writes whatever it likes into its segment, and one honest sequence beside it.
// Run under AddressSanitizer: no message may make the server touch what is not arena or slots,
// stop it, or change an honest answer.
//
//   hostile_worker FOLDER [MESSAGES] [SEED]
#include <atomic>
#include <chrono>
#include <cstring>
#include <fstream>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "executor.h"
#include "honest_worker.h"
#include "ring.h"
#include "server_loop.h"
#include "worker_link.h"

using namespace omniserve;

namespace {

constexpr std::uint32_t kHonestSequence = 0;
constexpr std::uint32_t kHonestSlots = 2;  // one for ATTEND, one for FREE

// Where a random worker strikes. Bookkeeping: lengths, tables, states that the server published.
class Hostile {
 public:
  Hostile(const SegmentView& segment, std::uint64_t seed)
      : segment_(segment), random_(seed), requests_(request_ring()), low_(low_ring()) {}

  std::uint64_t below(std::uint64_t n) { return random_() % n; }

  // Messages for any slot but the honest ones, most of them nearly right; returns how many.
  std::uint64_t send_some() {
    std::uint64_t sent = 0;
    for (std::uint64_t n = 1 + below(8); n > 0; --n) sent += send();
    requests_.publish();
    low_.publish();
    return sent;
  }

  void damage_bookkeeping() {
    const shm::Regions& r = segment_.regions();
    damage(r.sequence_state, r.request_ring - r.sequence_state, 1 + below(32));
  }
  // Everything between the header and the slab, and the header itself.
  void damage_everything() {
    damage(0, sizeof(shm::Header) - sizeof(shm::Doorbell), below(8));
    damage(shm::kPageAlign, segment_.regions().slab - shm::kPageAlign, 1 + below(256));
  }
  void damage_indices() {
    for (const std::uint64_t ring : {segment_.regions().request_ring, segment_.regions().low_ring,
                                     segment_.regions().response_ring}) {
      auto* header = reinterpret_cast<shm::RingHeader*>(segment_.at_offset(ring));
      if (below(2)) header->head.store(near(header->head.load()));
      if (below(2)) header->tail.store(near(header->tail.load()));
    }
    shm::Doorbell& bell = segment_.header().doorbell;
    bell.value.store(static_cast<std::uint32_t>(random_()));
    bell.sleeping.store(static_cast<std::uint32_t>(below(3)));
  }
  void damage_entries() {
    const std::uint64_t bytes = 8ULL * shm::ring_capacity(segment_.geometry().slots);
    damage(segment_.regions().request_ring + sizeof(shm::RingHeader), bytes, below(64));
  }

 private:
  RingProducer request_ring() {
    return {segment_.at_offset(segment_.regions().request_ring),
            shm::ring_capacity(segment_.geometry().slots)};
  }
  RingProducer low_ring() {
    return {segment_.at_offset(segment_.regions().low_ring),
            shm::ring_capacity(segment_.geometry().slots)};
  }

  bool send() {
    const shm::Geometry& g = segment_.geometry();
    const auto slot = static_cast<std::uint32_t>(kHonestSlots + below(g.slots - kHonestSlots));
    shm::SlotHeader& h = segment_.slot(slot);
    h.kind = some(shm::kFree + 2);
    h.layer = some(g.layers + 1);
    h.sequence = 1 + some(g.max_sequences);
    if (h.sequence == kHonestSequence) h.sequence = 1;
    // Mostly the position whose turn it is, so that KV is appended and read.
    h.position = below(4) ? length(h.sequence, h.layer) : some(g.max_sequence_tokens + 2);
    h.count = below(4) ? 1 : some(shm::transfer_tokens(g) + 2);
    if (below(8) == 0) fill_row(slot);
    const std::uint32_t generation =
        below(8) ? h.request_generation.load() + 1 : static_cast<std::uint32_t>(random_());
    h.request_generation.store(generation, std::memory_order_release);
    std::uint64_t entry = shm::ring_entry(slot, generation);
    if (below(16) == 0) entry = random_();
    return (below(2) ? requests_ : low_).stage(entry);
  }
  std::uint32_t length(std::uint32_t sequence, std::uint32_t layer) {
    const shm::Geometry& g = segment_.geometry();
    if (sequence >= g.max_sequences || layer >= g.layers) return 0;
    return segment_.written_len(sequence)[layer].load();
  }
  // Small, or sometimes anything.
  std::uint32_t some(std::uint64_t n) {
    return static_cast<std::uint32_t>(below(32) ? below(n) : random_());
  }
  std::uint64_t near(std::uint64_t index) {
    switch (below(3)) {
      case 0: return random_();
      case 1: return index - below(128);
      default: return index + below(128);
    }
  }
  // Floats of any bits: NaN, infinities, denormals.
  void fill_row(std::uint32_t slot) {
    auto* words = reinterpret_cast<std::uint32_t*>(segment_.slab_row(slot));
    for (std::size_t i = 0; i < shm::slot_elems(segment_.geometry()); ++i)
      words[i] = static_cast<std::uint32_t>(random_());
  }
  void damage(std::uint64_t at, std::uint64_t size, std::uint64_t words) {
    for (; words > 0; --words) {
      auto* word = reinterpret_cast<std::atomic<std::uint32_t>*>(
          segment_.at_offset(at + below(size / 4) * 4));
      word->store(static_cast<std::uint32_t>(below(2) ? random_() : below(64)),
                  std::memory_order_relaxed);
    }
  }

  SegmentView segment_;
  std::mt19937_64 random_;
  RingProducer requests_;
  RingProducer low_;
};

// The indices as they are after format, for the next worker.
void mend_indices(const SegmentView& segment) {
  for (const std::uint64_t ring : {segment.regions().request_ring, segment.regions().low_ring,
                                   segment.regions().response_ring}) {
    auto* header = reinterpret_cast<shm::RingHeader*>(segment.at_offset(ring));
    header->head.store(0);
    header->tail.store(0);
  }
}

// A segment as a server formats it, in a heap block of exactly its size, so that the sanitizer sees
// every access beyond either end.
std::unique_ptr<std::byte, void (*)(void*)> heap_segment(const std::string& path,
                                                         const shm::Geometry& g) {
  const std::uint64_t size = shm::regions_of(g).end;
  std::unique_ptr<std::byte, void (*)(void*)> heap(
      static_cast<std::byte*>(std::aligned_alloc(shm::kLine, shm::align_up(size, shm::kLine))),
      std::free);
  std::ifstream(path, std::ios::binary).read(reinterpret_cast<char*>(heap.get()),
                                             static_cast<std::streamsize>(size));
  return heap;
}

// The server's part of a step, single-threaded, on a segment of the heap.
class HeapServer {
 public:
  explicit HeapServer(const SegmentView& segment)
      : segment_(segment),
        threads_(1),
        executor_(segment, threads_) {
    start_rings();
  }

  void start_rings() {
    const shm::Regions& r = segment_.regions();
    requests_ = RingConsumer(segment_.at_offset(r.request_ring), capacity());
    low_ = RingConsumer(segment_.at_offset(r.low_ring), capacity());
    responses_ = RingProducer(segment_.at_offset(r.response_ring), capacity());
  }
  void step() {
    drain(requests_);
    drain(low_);
  }
  // Hands a message over without a ring, which an index may have broken; returns its status.
  std::uint32_t serve(std::uint32_t slot) {
    const std::uint32_t generation = segment_.slot(slot).request_generation.load();
    auto message = executor_.resolve(shm::ring_entry(slot, generation));
    CHECK(message, "an honest message was dropped");
    std::vector<Message> batch{*message};
    run(batch);
    CHECK(segment_.slot(slot).done_generation.load() == generation, "no answer");
    return segment_.slot(slot).status;
  }
  const ExecutorStats& stats() const { return executor_.stats(); }
  std::uint64_t answered() const { return answered_; }

 private:
  std::uint32_t capacity() const { return shm::ring_capacity(segment_.geometry().slots); }
  void drain(RingConsumer& ring) {
    std::vector<Message> batch;
    std::uint64_t entry = 0;
    for (std::uint32_t n = 0; n < capacity() && ring.pop(entry); ++n) {
      executor_.prefetch(entry);
      if (auto message = executor_.resolve(entry)) batch.push_back(*message);
    }
    ring.release();
    run(batch);
  }
  void run(std::vector<Message>& batch) {
    answers_.clear();
    executor_.run(batch, answers_, [] {});
    answered_ += answers_.size();
    for (const std::uint64_t entry : answers_) responses_.stage(entry);
    responses_.publish();
  }

  SegmentView segment_;
  ThreadPool threads_;
  Executor executor_;
  RingConsumer requests_;
  RingConsumer low_;
  RingProducer responses_;
  std::vector<std::uint64_t> answers_;
  std::uint64_t answered_ = 0;
};

void serve_honestly(HeapServer& server, const SegmentView& segment, std::uint32_t kind,
                    std::uint32_t sequence, std::uint32_t position) {
  const std::uint32_t slot = kind == shm::kFree;
  shm::SlotHeader& h = segment.slot(slot);
  h.kind = kind;
  h.layer = 1;
  h.sequence = sequence;
  h.position = position;
  h.count = 1;
  h.request_generation.fetch_add(1);
  CHECK(server.serve(slot) == shm::kOk, "status %u", h.status);
}

void attend_honestly(HeapServer& server, const SegmentView& segment,
                     const HonestSequence& honest) {
  serve_honestly(server, segment, shm::kAttend, kHonestSequence, honest.tokens() - 1);
  honest.check_output(0);
}

// The executor on a heap segment, with one honest token between every few hostile messages.
void attack_executor(const std::string& path, std::uint64_t seed, std::uint64_t messages) {
  const shm::Geometry g = small_geometry();
  auto heap = heap_segment(path, g);
  const SegmentView segment(heap.get(), g);
  HeapServer server(segment);
  // Pages for the honest sequence first: the hostile ones take all that are left.
  HonestSequence honest(segment, seed);
  while (honest.tokens() < g.max_sequence_tokens) {
    honest.fill(0);
    attend_honestly(server, segment, honest);
  }
  Hostile hostile(segment, seed);
  std::uint64_t sent = 0;
  for (std::uint64_t round = 1; sent < messages; ++round) {
    sent += hostile.send_some();
    if (hostile.below(64) == 0) hostile.damage_bookkeeping();
    if (hostile.below(64) == 0) hostile.damage_entries();
    if (hostile.below(256) == 0) hostile.damage_indices();
    server.step();
    if (round % 256 == 0) {
      mend_indices(segment);
      server.start_rings();
      hostile = Hostile(segment, seed + round);
      honest.refill(0);
      attend_honestly(server, segment, honest);
      // The published lengths are right again, so that the next messages get far.
      for (std::uint32_t sequence = 1; sequence < g.max_sequences; ++sequence)
        serve_honestly(server, segment, shm::kFree, sequence, 0);
    }
  }
  const ExecutorStats& stats = server.stats();
  std::printf("executor: %lu messages, %lu answers, %lu rows, %lu errors\n", sent,
              server.answered(), stats.rows, stats.errors);
  CHECK(server.answered() > messages / 10 && stats.rows > messages / 50 && stats.errors > 0,
        "the attack hardly reached the server");
}

// The same token in every slot: each one's turn comes when the one before it is answered. The loop
// lets go of its segment now and then, and all are answered in the end.
void attack_rounds(const std::string& path) {
  shm::Geometry g = small_geometry();
  g.slots = 4096;
  create_file(path, shm::regions_of(g).end);
  Mapping mapping(path);
  const SegmentView segment(mapping.data(), g);
  std::memset(segment.page_table(0), 0xFF,
              4ULL * g.max_sequences * segment.max_pages_per_sequence());
  ThreadPool threads(1);
  Executor executor(segment, threads);
  for (std::uint32_t slot = 0; slot < g.slots; ++slot) {
    segment.slot(slot).kind = shm::kAttend;
    segment.slot(slot).request_generation.store(1);
  }
  std::vector<Message> batch = executor.unanswered();
  std::vector<std::uint64_t> answers;
  do {
    int groups = 0;
    executor.run(batch, answers, [&] { ++groups; });
    CHECK(groups < 100, "%d groups of rows in one run", groups);
    batch.clear();
  } while (executor.unfinished());
  CHECK(answers.size() == g.slots, "%zu answers", answers.size());
}

// Asks for tokens of sequence 0 as an honest worker does, and checks each answer.
void attend_through_link(const std::string& path, std::uint64_t seed) {
  WorkerLink link(path);
  HonestSequence honest(link.segment(), seed);
  for (std::int32_t position = 0; position < 20; ++position) {
    const std::int32_t slot = position % 3;
    const std::int32_t layer = 1;
    const std::int32_t sequence = kHonestSequence;
    honest.fill(static_cast<std::uint32_t>(slot));
    link.submit(shm::kAttend, &layer, &sequence, &position, nullptr, &slot, 1);
    std::vector<std::int32_t> slots;
    std::vector<std::uint8_t> statuses;
    const auto until = std::chrono::steady_clock::now() + std::chrono::seconds(30);
    while (slots.empty()) {
      CHECK(std::chrono::steady_clock::now() < until, "no answer to an honest message");
      std::this_thread::yield();
      link.poll(slots, statuses);
    }
    CHECK(slots[0] == slot && statuses[0] == shm::kOk, "status %d", statuses[0]);
    honest.check_output(static_cast<std::uint32_t>(slot));
  }
  link.check_integrity();
}

// A server loop in its own thread, while another thread overwrites everything that the worker can
// map. Then a new worker gets right answers.
void attack_loop(const std::string& path, const std::string& bell, std::uint64_t seed,
                 std::uint64_t messages) {
  constexpr std::uint64_t kPerEpoch = 4000;
  const shm::Geometry g = small_geometry();
  LoopOptions options;
  options.spin_us = 20;
  ServerLoop loop(path, options);
  Mapping mapping(path);
  const SegmentView segment(mapping.data(), g);
  std::uint64_t sent = 0;
  for (std::uint64_t epoch = 1; sent < messages; ++epoch) {
    loop.format("w0", epoch, epoch, g, bell, {});
    std::atomic<bool> stop{false};
    std::thread scribbler([&] {
      Hostile other(segment, seed + epoch);
      while (!stop.load()) {
        other.damage_everything();
        if (other.below(8) == 0) other.damage_indices();
        std::this_thread::sleep_for(std::chrono::microseconds(500));
      }
    });
    Hostile hostile(segment, seed - epoch);
    for (std::uint64_t n = 0; n < kPerEpoch;) {
      const std::uint64_t some = hostile.send_some();
      if (some == 0) hostile = Hostile(segment, seed + n);  // it believes the ring to be full
      n += some;
      ring_bell(segment.header().doorbell);
      if (hostile.below(16) == 0) std::this_thread::yield();
    }
    sent += kPerEpoch;
    stop.store(true);
    scribbler.join();
    CHECK(loop.owner().epoch == epoch && loop.owner().worker_id == "w0", "the owner changed");
    loop.format("w1", epoch, epoch, g, bell, {});
    attend_through_link(path, epoch);
  }
  const ExecutorStats stats = loop.stats();
  std::printf("loop: %lu messages, %lu errors in the last epoch\n", sent, stats.errors);
}

// Servers that start on segments which a worker damaged: adopted or refused, and usable after.
void attack_starts(const std::string& path, const std::string& bell, std::uint64_t seed,
                   int starts) {
  const shm::Geometry g = small_geometry();
  Mapping mapping(path);
  const SegmentView segment(mapping.data(), g);
  Hostile hostile(segment, seed);
  int adopted = 0;
  for (int i = 0; i < starts; ++i) {
    ServerLoop loop(path, LoopOptions{});
    if (loop.not_adopted().empty()) ++adopted;
    if (loop.not_adopted().empty() && hostile.below(2)) {
      hostile = Hostile(segment, seed + i);
      for (int n = 0; n < 20; ++n) hostile.send_some();
      ring_bell(segment.header().doorbell);
    } else {
      loop.format("w0", i, i, g, bell, {});
      attend_through_link(path, i);
    }
    loop.stop();
    switch (hostile.below(4)) {
      case 0: hostile.damage_everything(); break;
      case 1: hostile.damage_bookkeeping(); break;
      case 2: hostile.damage_indices(); break;
      default: break;
    }
  }
  std::printf("starts: %d, of which %d adopted\n", starts, adopted);
  CHECK(adopted > starts / 10 && adopted < starts, "not the mix that was meant");
}

}  // namespace

int main(int argc, char** argv) {
  CHECK(argc >= 2, "usage: hostile_worker FOLDER [MESSAGES] [SEED]");
  const std::string arena = std::string(argv[1]) + "/hostile.arena";
  const std::string bell = std::string(argv[1]) + "/hostile.bell";
  const std::uint64_t messages = argc > 2 ? std::stoull(argv[2]) : 1'000'000;
  const std::uint64_t seed = argc > 3 ? std::stoull(argv[3]) : 1;
  const shm::Geometry g = small_geometry();
  const std::uint64_t end = shm::regions_of(g).end;
  constexpr std::uint64_t kBeyond = 1 << 16;
  create_file(bell, sizeof(shm::Doorbell));
  create_file(arena, end + kBeyond);
  const Mapping mapping(arena);
  std::memset(mapping.data() + end, 0xA5, kBeyond);
  {
    ServerLoop loop(arena, LoopOptions{});
    loop.format("w0", 1, 1, g, bell, {});
  }
  attack_executor(arena, seed, messages / 2);
  attack_rounds(std::string(argv[1]) + "/rounds.arena");
  attack_loop(arena, bell, seed, messages - messages / 2);
  attack_starts(arena, bell, seed, 300);
  for (std::uint64_t i = 0; i < kBeyond; ++i)
    CHECK(mapping.data()[end + i] == std::byte{0xA5}, "written beyond the segment");
  return 0;
}
