#include "attend.h"

#include <algorithm>
#include <cmath>

namespace omniserve {
namespace {

// Below this many query x token x dimension products (about 0.1 ms) a wake-up costs more than
// it gains.
constexpr std::uint64_t kWorthSharing = 2u << 20;

}  // namespace

void attend(const KvPages& pages, std::uint32_t layer, std::uint32_t heads,
            const std::vector<Segment>& segments, ThreadPool& pool,
            std::vector<AttendUnit>& scratch) {
  const shm::Geometry& g = pages.geometry();
  const std::uint32_t group = heads / g.kv_heads;
  const std::size_t elem = shm::dtype_bytes(g.dtype);
  const float scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(g.head_dim)));
  scratch.clear();
  std::uint64_t work = 0;
  for (const Segment& s : segments) {
    const std::uint32_t queries = s.rows * group;
    work += std::uint64_t{queries} * (s.first_position + s.rows) * g.head_dim * g.kv_heads;
    for (std::uint32_t h = 0; h < g.kv_heads; ++h) {
      const std::size_t column = std::size_t{h} * group * g.head_dim * elem;
      AttendUnit unit{};
      unit.kv = pages.block(layer, 0, h);
      unit.page_stride = pages.page_stride();
      unit.table = s.table;
      unit.q = static_cast<const std::byte*>(s.q) + column;
      unit.out = static_cast<std::byte*>(s.out) + column;
      unit.q_stride = s.q_stride;
      unit.out_stride = s.out_stride;
      unit.page_tokens = g.page_tokens;
      unit.head_dim = g.head_dim;
      unit.group = group;
      unit.first_position = s.first_position;
      unit.scale = scale;
      for (std::uint32_t first = 0; first < queries; first += kUnitQueries) {
        unit.first_query = first;
        unit.queries = std::min(kUnitQueries, queries - first);
        scratch.push_back(unit);
      }
    }
  }
  const AttendFn kernel = attend_kernel(g.dtype);
  if (work < kWorthSharing) {
    for (const AttendUnit& unit : scratch) kernel(unit);
    return;
  }
  pool.run(static_cast<std::uint32_t>(scratch.size()),
           [&](std::uint32_t i) { kernel(scratch[i]); });
}

}  // namespace omniserve
