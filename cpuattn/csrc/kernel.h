// Decode and prefill attention over paged KV, one implementation for several instruction sets.
#pragma once

#include <cstddef>
#include <cstdint>

namespace omniserve {

// Some query vectors of one kv head against one sequence's pages. Query i belongs to row
// i / group and head i % group of the kv head, and sees tokens 0 .. first_position + row.
struct AttendUnit {
  const std::byte* kv;       // block of page 0, this layer and kv head
  std::size_t page_stride;   // bytes from a page's block to the next page's
  const std::int32_t* table;  // page ids of the sequence
  const void* q;             // row 0, first head of the kv head; [rows][..., group * head_dim]
  void* out;                 // the same shape
  std::size_t q_stride;      // elements between rows
  std::size_t out_stride;
  std::uint32_t page_tokens;
  std::uint32_t head_dim;
  std::uint32_t group;
  std::uint32_t first_query;
  std::uint32_t queries;  // at most kUnitQueries
  std::uint32_t first_position;
  float scale;
};

// Queries that share a page while it is in the first-level cache.
constexpr std::uint32_t kUnitQueries = 16;
constexpr std::uint32_t kMaxHeadDim = 256;
constexpr std::uint32_t kMaxPageTokens = 64;
constexpr std::uint32_t kMaxGroup = 16;

using AttendFn = void (*)(const AttendUnit&);

// The kernel in use, see dispatch.h, for shm::kFloat32 or shm::kBfloat16.
AttendFn attend_kernel(std::uint32_t dtype);

#define OMNISERVE_DECLARE_KERNEL(isa)              \
  namespace isa {                                  \
  void attend_f32(const AttendUnit& unit);         \
  void attend_bf16(const AttendUnit& unit);        \
  }
OMNISERVE_DECLARE_KERNEL(kernel_base)
OMNISERVE_DECLARE_KERNEL(kernel_v3)
OMNISERVE_DECLARE_KERNEL(kernel_v4)
#undef OMNISERVE_DECLARE_KERNEL

}  // namespace omniserve
