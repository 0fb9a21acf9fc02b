// Decode and prefill attention over paged KV, one implementation for several instruction sets.
#pragma once

#include <cstddef>
#include <cstdint>

namespace omniserve {

// Some query vectors of some neighbouring kv heads against a range of one sequence's tokens. Query
// i of a kv head belongs to row i / group and to its head i % group, and sees tokens
// 0 .. first_position + row, or the last `window` of them.
struct AttendUnit {
  const std::byte* kv;        // block of page 0 and the first kv head, of this layer
  std::size_t head_stride;    // bytes from a head's block to the next head's
  std::size_t page_stride;    // bytes from a page's block to the next page's
  const std::int32_t* table;  // page ids of the sequence
  const void* q;              // row 0, first head; [rows][kv_heads * group * head_dim]
  void* out;                  // the same shape
  std::size_t q_stride;       // elements between rows
  std::size_t out_stride;
  std::uint32_t row_dtype;    // of q and out
  std::uint32_t page_tokens;
  std::uint32_t head_dim;
  std::uint32_t kv_heads;
  std::uint32_t group;
  std::uint32_t first_query;
  std::uint32_t queries;  // of each kv head; kv_heads * queries is at most kUnitQueries
  std::uint32_t first_position;
  std::uint32_t first_chunk;  // chunks first_chunk .. last_chunk, see chunk_first_page()
  std::uint32_t last_chunk;
  std::uint32_t window;    // 0 = all tokens
  float scale;             // of scores
  float softcap;           // 0 = none
  const float* sinks;      // [kv_heads * group] logits that join the softmax; null = none
  float* partial;          // null if the unit has all chunks of its queries, else see `merge`
  bool leads;              // has the first chunk of its queries
};

constexpr std::uint32_t kUnitQueries = 64;
// Queries of a prompt that share a page while it is in the first-level cache.
constexpr std::uint32_t kPromptQueries = 32;
constexpr std::uint32_t kMaxHeadDim = 256;
constexpr std::uint32_t kMaxPageTokens = 64;
constexpr std::uint32_t kMaxGroup = 16;

// A sequence is cut into chunks at fixed tokens. Each is attended on its own, and the results are
// joined in order, whoever computed them: so a row's result depends neither on its batch nor on the
// number of threads. The first two have about 512 tokens, so that threads share a short sequence;
// the others have twice as many, for each costs memory traffic and a pause of the reading.
constexpr std::uint32_t chunk_first_page(std::uint32_t chunk, std::uint32_t page_tokens) {
  return (chunk < 2 ? chunk : 2 * (chunk - 1)) * (512 / page_tokens);
}
// The chunk that a token belongs to.
constexpr std::uint32_t chunk_of(std::uint32_t token, std::uint32_t page_tokens) {
  const std::uint32_t half = token / page_tokens / (512 / page_tokens);
  return half < 2 ? half : 1 + half / 2;
}

// Floats of one query in `partial`: its output, then maximum and sum of its softmax.
constexpr std::size_t partial_stride(std::uint32_t head_dim) { return head_dim + 16; }

struct Kernels {
  // Attends a unit; meanwhile fetches what `next` (may be null) begins with.
  using Attend = void (*)(const AttendUnit& unit, const AttendUnit* next);
  // Joins `partials` [count][kv_heads * queries][partial_stride] of units with the same queries into
  // their out. A unit that leads leaves one partial, its chunks joined; others leave one per chunk,
  // since sums must not depend on where a sequence was cut.
  using Merge = void (*)(const AttendUnit& unit, const float* partials, std::uint32_t count);

  // What int8 KV makes of one head's row [dim] of `dtype`: values[i] = round(row[i] / step) ^ flip.
  // Returns the step, 127 of which are the row's largest magnitude; 0 for a row of (nearly) nothing.
  using Quantise = float (*)(const void* row, std::uint32_t dtype, std::uint32_t dim,
                             std::uint8_t flip, std::uint8_t* values);
  // The way back: row[i] = (values[i] ^ flip) * step, rounded to `dtype`.
  using Dequantise = void (*)(const std::uint8_t* values, float step, std::uint8_t flip,
                              std::uint32_t dtype, std::uint32_t dim, void* row);

  const char* name;
  bool fetch_into_second_level;  // what is fetched ahead belongs there, not into the first level
  Attend float32;
  Attend bfloat16;
  Attend float16;
  Attend int8;
  Merge merge;
  Quantise quantise;
  Dequantise dequantise;

  Attend attend(std::uint32_t kv_dtype) const;
};

// The kernels in use, see dispatch.h.
const Kernels& kernels();

namespace kernel_base { extern const Kernels kKernels; }
namespace kernel_v3 { extern const Kernels kKernels; }
namespace kernel_v4 { extern const Kernels kKernels; }
namespace kernel_v4_dot { extern const Kernels kKernels; }
namespace kernel_zen4 { extern const Kernels kKernels; }

}  // namespace omniserve
