// Attention of many rows over pages: cuts the work into kernel units and shares them out.
#pragma once

#include <cstdint>
#include <vector>

#include "kernel.h"
#include "kv_pages.h"
#include "thread_pool.h"

namespace omniserve {

// Consecutive rows of one sequence; row r sees tokens 0 .. first_position + r.
struct Segment {
  const std::int32_t* table;
  const void* q;  // [rows][heads * head_dim]
  void* out;      // the same
  std::size_t q_stride;  // elements between rows
  std::size_t out_stride;
  std::uint32_t rows;
  std::uint32_t first_position;
};

// `scratch` only saves allocations between calls.
void attend(const KvPages& pages, std::uint32_t layer, std::uint32_t heads,
            const std::vector<Segment>& segments, ThreadPool& pool,
            std::vector<AttendUnit>& scratch);

}  // namespace omniserve
