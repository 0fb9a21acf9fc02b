// Attention of many rows over pages: cuts the work into kernel units and shares them out.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "kernel.h"
#include "kv_pages.h"
#include "thread_pool.h"

namespace omniserve {

// Consecutive rows of one sequence; row r sees tokens 0 .. first_position + r.
struct Segment {
  const std::int32_t* table;
  const void* q;  // [rows][heads * head_dim] of the geometry's row dtype
  void* out;      // the same
  std::size_t q_stride;  // elements between rows
  std::size_t out_stride;
  std::uint32_t rows;
  std::uint32_t first_position;
};

// What a layer does besides softmax(q k) v.
struct AttendOptions {
  std::uint32_t window = 0;  // 0 = all tokens
  float softcap = 0;         // 0 = none
  const float* sinks = nullptr;  // [heads], null = none
};

// Not thread-safe: one caller at a time. Keeps its memory between calls.
class Attention {
 public:
  // A single row of a sequence that is long beside the others is cut for several threads, at ends
  // of chunks; rows of a prompt are cut into blocks of queries.
  void run(const KvPages& pages, std::uint32_t layer, std::uint32_t heads,
           const std::vector<Segment>& segments, const AttendOptions& options, ThreadPool& pool);

 private:
  // Units of the same queries. The last to end joins their partial results.
  struct Join {
    std::uint32_t first_unit;
    std::uint32_t units;
    std::uint32_t count;   // of partials
    std::size_t partials;  // where in partials_
  };
  // A thread's share of the units: it takes them in order, and then those of others.
  struct alignas(64) Share {
    std::atomic<std::uint32_t> next;
    std::uint32_t end;
  };

  void cut(const KvPages& pages, std::uint32_t layer, std::uint32_t heads, const Segment& segment,
           const AttendOptions& options);
  void add_units(AttendUnit unit, const KvPages& pages, std::uint32_t layer,
                 const Segment& segment, const AttendOptions& options);
  void place_partials();
  void share_out(unsigned threads);
  void work(Kernels::Attend attend, Kernels::Merge merge);
  void work_on(Share& share, Kernels::Attend attend, Kernels::Merge merge);

  std::uint32_t unit_heads_ = 1;   // kv heads of a unit of a single row
  std::uint64_t unit_blocks_ = 0;  // that such a unit reads at most, if it has more than one chunk
  std::vector<AttendUnit> units_;
  std::vector<std::int32_t> join_of_;  // per unit; -1 = its result is final
  std::vector<Join> joins_;
  std::unique_ptr<std::atomic<std::uint32_t>[]> left_;  // per join, units that have not ended
  std::size_t left_capacity_ = 0;
  std::vector<float> partials_;
  std::unique_ptr<Share[]> shares_;
  std::uint32_t share_count_ = 0;
  std::atomic<std::uint32_t> workers_{0};
};

}  // namespace omniserve
