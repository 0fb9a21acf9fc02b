#include "attend.h"

#include <algorithm>
#include <cmath>

namespace omniserve {
namespace {

// Below this many query x token x dimension products (about 0.1 ms) waking a sleeping thread costs
// more than it gains.
constexpr std::uint64_t kWorthWaking = 4u << 20;

// So that a thread which was kept from running holds up the others for a part of the work only.
constexpr std::uint32_t kUnitsPerThread = 4;

// The first token that a row with tokens 0 .. end - 1 sees.
std::uint32_t seen_from(std::uint32_t end, std::uint32_t window) {
  return window != 0 && end > window ? end - window : 0;
}

// Blocks that a unit reads at most.
std::uint64_t blocks_of(const AttendUnit& unit) {
  const std::uint32_t last_row = (unit.first_query + unit.queries - 1) / unit.group;
  const std::uint32_t end = std::min(chunk_first_page(unit.last_chunk + 1, unit.page_tokens),
                                     (unit.first_position + last_row) / unit.page_tokens + 1);
  const std::uint32_t first = chunk_first_page(unit.first_chunk, unit.page_tokens);
  return std::uint64_t{end - first} * unit.kv_heads;
}

}  // namespace

void Attention::run(const KvPages& pages, std::uint32_t layer, std::uint32_t heads,
                    const std::vector<Segment>& segments, const AttendOptions& options,
                    ThreadPool& pool) {
  units_.clear();
  join_of_.clear();
  joins_.clear();
  const shm::Geometry& g = pages.geometry();
  std::uint64_t products = 0;
  std::uint64_t chunks = 0;  // of single rows
  std::uint64_t blocks = 0;  // the same
  for (const Segment& s : segments) {
    products += std::uint64_t{s.rows} * heads * g.head_dim * (s.first_position + s.rows);
    if (s.rows != 1) continue;
    const std::uint32_t from = seen_from(s.first_position + 1, options.window);
    chunks += chunk_of(s.first_position, g.page_tokens) - chunk_of(from, g.page_tokens) + 1;
    blocks += std::uint64_t{(s.first_position - from) / g.page_tokens + 1} * g.kv_heads;
  }
  const bool share = pool.threads() > 1 && (pool.spins() || products >= kWorthWaking);
  const unsigned threads = share ? pool.threads() : 1;
  // A page's heads lie side by side: together they are one long read. Cut only to have enough
  // units for all threads.
  unit_heads_ = std::min(g.kv_heads, kUnitQueries / (heads / g.kv_heads));
  while (unit_heads_ > 1 && chunks * (g.kv_heads / unit_heads_) < threads && threads > 1)
    unit_heads_ = (unit_heads_ + 1) / 2;
  // Chunks of one unit are joined in the cache, those of several by way of memory.
  unit_blocks_ = threads > 1 ? blocks / (kUnitsPerThread * threads) : blocks;
  for (const Segment& s : segments) cut(pages, layer, heads, s, options);
  place_partials();
  share_out(threads);
  const Kernels& k = kernels();
  const Kernels::Attend attend = k.attend(g.kv_dtype);
  if (share)
    pool.run([&] { work(attend, k.merge); });
  else
    work(attend, k.merge);
}

void Attention::cut(const KvPages& pages, std::uint32_t layer, std::uint32_t heads,
                    const Segment& s, const AttendOptions& options) {
  const shm::Geometry& g = pages.geometry();
  AttendUnit unit{};
  unit.head_stride = shm::block_bytes(g);
  unit.page_stride = pages.page_stride();
  unit.table = s.table;
  unit.q_stride = s.q_stride;
  unit.out_stride = s.out_stride;
  unit.row_dtype = g.dtype;
  unit.page_tokens = g.page_tokens;
  unit.head_dim = g.head_dim;
  unit.group = heads / g.kv_heads;
  unit.first_position = s.first_position;
  unit.window = options.window;
  unit.scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(g.head_dim)));
  unit.softcap = options.softcap;

  const std::uint32_t queries = s.rows * unit.group;
  const std::uint32_t most = s.rows == 1 ? unit.group : kPromptQueries;
  for (std::uint32_t first = 0; first < queries; first += most) {
    unit.first_query = first;
    unit.queries = std::min(most, queries - first);
    const std::uint32_t first_end = s.first_position + first / unit.group + 1;
    const std::uint32_t last_end = s.first_position + (first + unit.queries - 1) / unit.group + 1;
    unit.first_chunk = chunk_of(seen_from(first_end, options.window), g.page_tokens);
    unit.last_chunk = chunk_of(last_end - 1, g.page_tokens);
    add_units(unit, pages, layer, s, options);
  }
}

void Attention::add_units(AttendUnit unit, const KvPages& pages, std::uint32_t layer,
                          const Segment& s, const AttendOptions& options) {
  const shm::Geometry& g = pages.geometry();
  const std::size_t head_bytes = unit.group * g.head_dim * shm::dtype_bytes(g.dtype);
  const std::uint32_t unit_heads = s.rows == 1 ? unit_heads_ : 1;
  const std::uint32_t first_chunk = unit.first_chunk;
  const std::uint32_t last_chunk = unit.last_chunk;
  const auto first_join = static_cast<std::int32_t>(joins_.size());
  unit.leads = true;
  for (std::uint32_t chunk = first_chunk; chunk <= last_chunk; chunk = unit.last_chunk + 1) {
    unit.kv_heads = unit_heads;
    unit.first_chunk = chunk;
    unit.last_chunk = s.rows == 1 ? chunk : last_chunk;
    for (AttendUnit longer = unit; ++longer.last_chunk <= last_chunk;) {
      if (blocks_of(longer) > unit_blocks_) break;
      unit.last_chunk = longer.last_chunk;
    }
    const bool whole = unit.leads && unit.last_chunk == last_chunk;
    std::int32_t join = first_join;
    for (std::uint32_t h = 0; h < g.kv_heads; h += unit_heads, ++join) {
      unit.kv_heads = std::min(unit_heads, g.kv_heads - h);
      unit.kv = pages.block(layer, 0, h);
      unit.q = static_cast<const std::byte*>(s.q) + h * head_bytes;
      unit.out = static_cast<std::byte*>(s.out) + h * head_bytes;
      unit.sinks = options.sinks != nullptr ? options.sinks + h * unit.group : nullptr;
      if (!whole && unit.leads)
        joins_.push_back({static_cast<std::uint32_t>(units_.size()), 0, 0, 0});
      if (!whole) {
        ++joins_[join].units;
        joins_[join].count += unit.leads ? 1 : unit.last_chunk - chunk + 1;
      }
      join_of_.push_back(whole ? -1 : join);
      units_.push_back(unit);
    }
    unit.leads = false;
  }
}

void Attention::place_partials() {
  if (joins_.empty()) return;
  const auto floats_of = [](const AttendUnit& unit) {
    return std::size_t{unit.kv_heads} * unit.queries * partial_stride(unit.head_dim);
  };
  std::size_t floats = 0;
  for (Join& join : joins_) {
    join.partials = floats;
    floats += join.count * floats_of(units_[join.first_unit]);
  }
  if (partials_.size() < floats) partials_.resize(floats);
  if (left_capacity_ < joins_.size()) {
    left_capacity_ = 2 * joins_.size();
    left_ = std::make_unique<std::atomic<std::uint32_t>[]>(left_capacity_);
  }
  for (std::size_t j = 0; j < joins_.size(); ++j)
    left_[j].store(joins_[j].units, std::memory_order_relaxed);
  for (std::size_t i = 0; i < units_.size(); ++i) {
    if (join_of_[i] < 0) continue;
    const Join& join = joins_[join_of_[i]];
    const std::uint32_t before =
        units_[i].leads ? 0 : units_[i].first_chunk - units_[join.first_unit].last_chunk;
    units_[i].partial = partials_.data() + join.partials + before * floats_of(units_[i]);
  }
}

// Neighbouring units go to one thread, so that it reads on where it stopped. Shares read alike many
// pages.
void Attention::share_out(unsigned threads) {
  if (share_count_ != threads) {
    shares_ = std::make_unique<Share[]>(threads);
    share_count_ = threads;
  }
  std::uint64_t blocks = 0;
  for (const AttendUnit& unit : units_) blocks += blocks_of(unit);
  std::uint64_t before = 0;  // blocks of the units that have a share
  std::uint32_t i = 0;
  for (unsigned t = 0; t < threads; ++t) {
    shares_[t].next.store(i, std::memory_order_relaxed);
    // A unit goes where its middle lies.
    while (i < units_.size() && (2 * before + blocks_of(units_[i])) * threads < 2 * blocks * (t + 1))
      before += blocks_of(units_[i++]);
    shares_[t].end = i;
  }
  workers_.store(0, std::memory_order_relaxed);
}

void Attention::work(Kernels::Attend attend, Kernels::Merge merge) {
  const std::uint32_t own = workers_.fetch_add(1, std::memory_order_relaxed);
  for (std::uint32_t i = 0; i < share_count_; ++i)
    work_on(shares_[(own + i) % share_count_], attend, merge);
}

void Attention::work_on(Share& share, Kernels::Attend attend, Kernels::Merge merge) {
  for (std::uint32_t i; (i = share.next.fetch_add(1, std::memory_order_relaxed)) < share.end;) {
    attend(units_[i], i + 1 < share.end ? &units_[i + 1] : nullptr);
    if (join_of_[i] < 0) continue;
    const auto j = static_cast<std::size_t>(join_of_[i]);
    if (left_[j].fetch_sub(1, std::memory_order_acq_rel) == 1)
      merge(units_[joins_[j].first_unit], partials_.data() + joins_[j].partials, joins_[j].count);
  }
}

}  // namespace omniserve
