// The segment that one worker and one attention server share: a file on tmpfs.
//
// The server writes everything except what is marked "worker". All references are offsets from
// the start of the file. layout.py mirrors this file; tests/contract compares every offset.
// A change of any struct or region raises kLayoutVersion.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

namespace omniserve::shm {

constexpr std::uint64_t kMagic = 0x314745534E4D4FULL;  // "OMNSEG1"
constexpr std::uint32_t kLayoutVersion = 4;
constexpr std::uint64_t kPageAlign = 4096;
constexpr std::uint64_t kLine = 64;

// kInt8 is for KV only: one float32 scale per token, kv head, and K or V.
enum Dtype : std::uint32_t { kFloat32 = 1, kBfloat16 = 2, kFloat16 = 3, kInt8 = 4 };

// What a slot asks for. ATTEND and FREE travel in the request ring, the others in the low one.
// CHECKPOINT and RESTORE are of up to transfer_tokens(g) tokens, whose rows fill the slot from its
// start: [count][k | v].
enum Kind : std::uint32_t { kAttend = 1, kCheckpoint = 2, kRestore = 3, kFree = 4 };

enum Status : std::uint32_t {
  kOk = 0,
  kBadKind = 1,
  kBadLayer = 2,
  kBadSequence = 3,
  kBadPosition = 4,  // beyond max_sequence_tokens, or older than the last token written
  kNoPage = 5,
  kFreed = 6,  // the sequence was freed while this message waited for its turn
  kBadCount = 7,
};

enum SequenceState : std::uint32_t { kEmpty = 0, kActive = 1 };

struct Geometry {
  std::uint32_t layers;
  std::uint32_t heads;
  std::uint32_t kv_heads;
  std::uint32_t head_dim;
  std::uint32_t dtype;     // Dtype of the rows in slots
  std::uint32_t kv_dtype;  // Dtype of KV: that of the rows, or kInt8
  std::uint32_t page_tokens;
  std::uint32_t max_sequences;
  std::uint32_t max_sequence_tokens;
  std::uint32_t slots;
  std::uint32_t pages;
};

// Byte offsets from the start of the segment.
struct Regions {
  std::uint64_t sequence_state;  // atomic u32[max_sequences]
  std::uint64_t written_len;     // atomic u32[max_sequences][layers]
  std::uint64_t page_table;      // i32[max_sequences][max_pages_per_sequence], -1 = none
  std::uint64_t layer_options;   // LayerOptions[layers]
  std::uint64_t sinks;           // f32[layers][heads], -inf = none
  std::uint64_t request_ring;    // RingHeader, u64[ring_capacity]; produced by the worker
  std::uint64_t low_ring;        // the same; produced by the worker
  std::uint64_t response_ring;   // the same; produced by the server
  std::uint64_t slot_headers;    // SlotHeader[slots]
  std::uint64_t slab;            // [slots][q | k | v | out], worker's but for out, and all of it in RESTORE
  std::uint64_t kv;              // [layers][pages][kv_heads] blocks
  std::uint64_t end;
};

// What attention of one layer does besides softmax(q k) v.
struct LayerOptions {
  std::uint32_t window;  // a token sees the last `window` tokens, itself among them; 0 = all
  float softcap;         // scores become softcap * tanh(score / softcap); 0 = not
};

// A futex word with one sleeper. `sleeping` spares the ringer a system call.
struct Doorbell {
  std::atomic<std::uint32_t> value;
  std::atomic<std::uint32_t> sleeping;
  std::uint8_t reserved[56];
};

struct Header {
  std::uint64_t magic;
  std::uint32_t layout_version;
  std::atomic<std::uint32_t> ready;  // published last
  std::uint64_t epoch;
  std::uint64_t segment_id;
  std::uint64_t arena_bytes;
  Geometry geometry;
  std::uint32_t ring_capacity;
  std::uint32_t max_pages_per_sequence;
  std::uint32_t padding;
  Regions regions;
  char worker_id[64];
  char bell_path[256];
  Doorbell doorbell;  // rung by the worker after it published requests
};

struct RingHeader {
  std::atomic<std::uint64_t> head;  // consumer
  std::uint8_t head_reserved[56];
  std::atomic<std::uint64_t> tail;  // producer
  std::uint8_t tail_reserved[56];
};

// At most one message of a slot is outstanding: request_generation != done_generation.
struct SlotHeader {
  std::uint32_t kind;      // worker
  std::uint32_t layer;     // worker
  std::uint32_t sequence;  // worker
  std::uint32_t position;  // worker; of the first token
  std::uint32_t count;     // worker; tokens of CHECKPOINT and RESTORE, 1 otherwise
  std::atomic<std::uint32_t> request_generation;  // worker, written last
  std::uint32_t status;
  std::atomic<std::uint32_t> done_generation;  // written last
  std::uint8_t reserved[32];
};

static_assert(std::atomic<std::uint32_t>::is_always_lock_free);
static_assert(std::atomic<std::uint64_t>::is_always_lock_free);
static_assert(sizeof(Header) == 576 && offsetof(Header, doorbell) % kLine == 0);
static_assert(sizeof(RingHeader) == 2 * kLine && sizeof(SlotHeader) == kLine);
static_assert(sizeof(Doorbell) == kLine);

// A ring entry names a slot and the generation of the message in it.
constexpr std::uint64_t ring_entry(std::uint32_t slot, std::uint32_t generation) {
  return static_cast<std::uint64_t>(generation) << 32 | slot;
}
constexpr std::uint32_t entry_slot(std::uint64_t entry) { return static_cast<std::uint32_t>(entry); }
constexpr std::uint32_t entry_generation(std::uint64_t entry) {
  return static_cast<std::uint32_t>(entry >> 32);
}

constexpr std::uint64_t align_up(std::uint64_t value, std::uint64_t to) {
  return (value + to - 1) / to * to;
}

constexpr std::uint64_t dtype_bytes(std::uint32_t dtype) {
  return dtype == kFloat32 ? 4 : dtype == kInt8 ? 1 : 2;
}

// Neighbours along the summed dimension that lie side by side: what one dot-product instruction
// takes.
constexpr std::uint32_t packing(std::uint32_t kv_dtype) {
  return kv_dtype == kInt8 ? 4 : kv_dtype == kBfloat16 ? 2 : 1;
}

// Power of two. A slot can have two entries in the response ring: the answer to its message, and
// one that a restarted server repeats because it cannot know whether the worker consumed it.
constexpr std::uint32_t ring_capacity(std::uint32_t slots) {
  std::uint32_t capacity = 1;
  while (capacity <= 2 * slots) capacity *= 2;
  return capacity;
}

constexpr std::uint64_t slot_elems(const Geometry& g) {
  return 2ULL * (g.heads + g.kv_heads) * g.head_dim;
}

// Tokens of one layer whose K and V a slot has room for.
constexpr std::uint32_t transfer_tokens(const Geometry& g) {
  return (g.heads + g.kv_heads) / g.kv_heads;
}

// What an inner loop of the kernel covers: tokens of K, dimensions of V. It reads on in memory.
constexpr std::uint32_t kGroupLanes = 32;

// One (layer, page, kv head), with P = packing(kv_dtype) and G = kGroupLanes:
//   K [page_tokens / G][head_dim / P][G][P],
//   for kInt8 float32 scales of K [page_tokens] and of V [page_tokens],
//   V [head_dim / G][page_tokens / P][G][P],
// the last group being narrower where G does not divide. kInt8 holds K + 128 as unsigned bytes, V as
// signed ones. All of it lies in the order in which the kernel reads it.
constexpr std::uint64_t scales_offset(const Geometry& g) {
  return std::uint64_t{g.head_dim} * g.page_tokens * dtype_bytes(g.kv_dtype);
}
constexpr std::uint64_t v_offset(const Geometry& g) {
  return scales_offset(g) + (g.kv_dtype == kInt8 ? 2ULL * g.page_tokens * sizeof(float) : 0);
}
constexpr std::uint64_t block_bytes(const Geometry& g) { return v_offset(g) + scales_offset(g); }

// One page id: its blocks in all layers.
constexpr std::uint64_t page_bytes(const Geometry& g) {
  return block_bytes(g) * g.kv_heads * g.layers;
}

constexpr std::uint32_t max_pages_per_sequence(const Geometry& g) {
  return (g.max_sequence_tokens + g.page_tokens - 1) / g.page_tokens;
}

// Regions in file order; only `end` depends on `geometry.pages`.
constexpr Regions regions_of(const Geometry& g) {
  Regions r{};
  const std::uint64_t ring_bytes = sizeof(RingHeader) + 8ULL * ring_capacity(g.slots);
  std::uint64_t at = kPageAlign;
  r.sequence_state = at;
  at = align_up(at + 4ULL * g.max_sequences, kLine);
  r.written_len = at;
  at = align_up(at + 4ULL * g.max_sequences * g.layers, kLine);
  r.page_table = at;
  at = align_up(at + 4ULL * g.max_sequences * max_pages_per_sequence(g), kLine);
  r.layer_options = at;
  at = align_up(at + sizeof(LayerOptions) * g.layers, kLine);
  r.sinks = at;
  at = align_up(at + sizeof(float) * g.layers * g.heads, kLine);
  r.request_ring = at;
  at = align_up(at + ring_bytes, kLine);
  r.low_ring = at;
  at = align_up(at + ring_bytes, kLine);
  r.response_ring = at;
  at = align_up(at + ring_bytes, kLine);
  r.slot_headers = at;
  at += sizeof(SlotHeader) * static_cast<std::uint64_t>(g.slots);
  r.slab = align_up(at, kPageAlign);
  at = r.slab + slot_elems(g) * dtype_bytes(g.dtype) * g.slots;
  r.kv = align_up(at, kPageAlign);
  r.end = r.kv + page_bytes(g) * g.pages;
  return r;
}

// Whether `size` bytes hold the segment. Not `end <= size`, for `end` can wrap around: a geometry
// within all its bounds can ask for more than 2^64 bytes of KV. What lies before KV stays far below.
constexpr bool fits(const Geometry& g, std::uint64_t size) {
  const std::uint64_t kv = regions_of(g).kv;
  return kv <= size && g.pages <= (size - kv) / page_bytes(g);
}

}  // namespace omniserve::shm
