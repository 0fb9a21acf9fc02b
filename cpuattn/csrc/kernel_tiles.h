// The order in which the kernel reads a unit's pages. Part of kernel_impl.h, compiled with it.
#pragma once

#include "kernel.h"

namespace omniserve::OMNISERVE_KERNEL_ISA {
namespace {

constexpr std::uint32_t kMaxTilePages = 4;

// One kv head's blocks of a tile's pages.
struct Blocks {
  const std::byte* at[kMaxTilePages];

  INLINE Blocks next_head(std::size_t head_stride) const {
    Blocks next = *this;
    for (const std::byte*& block : next.at) block += head_stride;
    return next;
  }
};

// The pages of up to kTileTokens tokens. Behind the last one its block is repeated.
struct Tile {
  std::uint32_t start;  // its first token
  std::uint32_t pages;
  Blocks first_head;
};

// How memory is fetched ahead of its reading in passes of N queries, all of it measured: far enough
// for its latency, and little enough to be still in the cache when its turn comes.
template <typename F, int N>
struct Fetch {
#if defined(OMNISERVE_KERNEL_ZEN4)
  // A core of Zen 4 waits for at most 24 lines that instructions asked for, which is 21 GB/s. Its own
  // prefetchers get 32 GB/s as long as they see one stream without gaps. So where memory takes longer
  // than arithmetic every other line is fetched, which keeps them going through pauses. Where it
  // does not, they lose the stream: then every line is fetched.
  static constexpr bool kWaitsForMemory = N <= (F::kScaled ? 3 : 4);
  static constexpr bool kFirstLevel = false;
  static constexpr int kEvery = kWaitsForMemory ? 2 : 1;
  static constexpr std::size_t kAhead = kWaitsForMemory ? 6144 : 8192;
  // Lines of V for each query, while scores become weights and nothing is read.
  static constexpr bool kPauseBegins = true;  // with the next line that is read
  static constexpr int kPauseLines = !F::kScaled && N >= 3 ? 32 / N : 0;
#else
  static constexpr bool kFirstLevel = true;
  static constexpr int kEvery = 1;
  static constexpr std::size_t kAhead = 6144;
  // Formats of floats, which have one loop, do without: all that was tried made it slower.
  static constexpr bool kPauseBegins = false;  // but kAhead later
  static constexpr int kPauseLines = !F::kScaled ? 0 : N >= 4 ? 14 : 4;
#endif

  // Fetches for the c-th of the lines that lie side by side.
  static INLINE void line(const std::byte* p, int c) {
    if (c % kEvery == 0) __builtin_prefetch(p, 0, kFirstLevel ? 3 : 2);
  }
};

// A distance with which no run of lines steps across a block's end, for where the next one lies
// elsewhere.
constexpr std::size_t kFetchApart = 8192;

// What comes kAhead later than `at` in the order of reading blocks of `size` bytes.
template <typename F, int N>
INLINE const std::byte* ahead_of(const Blocks& blocks, const Blocks& ahead, std::uint32_t page,
                                 std::size_t at, std::size_t size) {
  const bool follows = ahead.at[page] == blocks.at[page] + size;
  const std::size_t to = at + (follows ? Fetch<F, N>::kAhead : kFetchApart);
  if (to < size) return blocks.at[page] + to;
  return ahead.at[page] + (to - size < size ? to - size : at);
}

// Where a block's V begins.
template <typename F>
INLINE std::size_t v_offset(const AttendUnit& u) {
  return std::size_t{u.page_tokens} * (u.head_dim * F::kBytes + (F::kScaled ? 2 * sizeof(float) : 0));
}

// A unit's position in its tiles. All of its chunks begin at tile boundaries.
struct Cursor {
  const AttendUnit* unit;
  std::uint32_t tile_pages;
  std::uint32_t page;
  std::uint32_t end_page;

  explicit INLINE Cursor(const AttendUnit& u) : unit(&u) {
    tile_pages = kTileTokens / u.page_tokens;
    const std::uint32_t tokens =
        u.first_position + (u.first_query + u.queries - 1) / u.group + 1;
    const std::uint32_t pages = (tokens + u.page_tokens - 1) / u.page_tokens;
    page = chunk_first_page(u.first_chunk, u.page_tokens);
    end_page = chunk_first_page(u.last_chunk + 1, u.page_tokens);
    if (end_page > pages) end_page = pages;
  }
  INLINE bool done() const { return page >= end_page; }
  INLINE Tile tile() const {
    Tile t{page * unit->page_tokens, end_page - page, {}};
    if (t.pages > tile_pages) t.pages = tile_pages;
    for (std::uint32_t i = 0; i < kMaxTilePages; ++i)
      t.first_head.at[i] =
          i < t.pages ? unit->kv + unit->table[page + i] * unit->page_stride
                      : t.first_head.at[t.pages - 1];
    return t;
  }
  INLINE void advance() { page += tile_pages; }
};

}  // namespace
}  // namespace omniserve::OMNISERVE_KERNEL_ISA
