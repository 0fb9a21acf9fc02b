#include "kv_pages.h"

#ifdef __SSE2__
#include <emmintrin.h>
#endif

#include <algorithm>
#include <atomic>
#include <cstring>

#include "kernel.h"

namespace omniserve {
namespace {

constexpr std::size_t kGroup = shm::kGroupLanes;
constexpr std::size_t kRunTokens = kGroup;
constexpr std::size_t kMaxDim = 256;
constexpr std::size_t kLine = shm::kLine;
// What is worth waking another thread for.
constexpr std::size_t kSharedBytes = 32 << 10;

// Rows of one head: pointer i belongs to token `offset + i` of the page.
struct HeadRows {
  const KvToken* run;
  std::byte* KvToken::* part;
  std::size_t at;  // bytes before the head

  std::byte* operator[](std::size_t i) const { return run[i].*part + at; }
};

using Word4 = std::uint32_t __attribute__((vector_size(16)));

template <typename T>
T load(const std::byte* from) {
  T value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

// Fetches what is moved next while something else is moved: the rows of its tokens, and the page if
// it is read. In the order in which they lie, as memory gives them fastest.
class Ahead {
 public:
  // steps: of advance(), until all is fetched.
  Ahead(const KvPages& pages, const KvToken* run, std::size_t n, bool page, std::size_t steps)
      : token_(run),
        end_(run + n),
        row_lines_(pages.row_bytes() / kLine),
        steps_(steps),
        lines_(2 * n * row_lines_) {
    if (n == 0) return;
    start(run->k, row_lines_);
    if (!page || run->offset != 0) return;
    page_ = pages.block(run->layer, run->page, 0);
    page_lines_ = pages.page_stride() / kLine;
    lines_ += page_lines_;
  }

  void advance(std::size_t steps) {
    step_ += steps;
    for (const std::size_t target = lines_ * step_ / steps_; fetched_ < target; ++fetched_) {
      while (left_ == 0) next();  // a row may be shorter than a line
      if (second_level_) __builtin_prefetch(at_, 0, 2);
      else __builtin_prefetch(at_);
      at_ += kLine;
      --left_;
    }
  }

 private:
  void start(const std::byte* at, std::size_t lines) {
    at_ = at;
    left_ = lines;
  }
  void next() {
    if (token_ == end_) return start(page_, page_lines_);
    if (!in_v_) {
      start(token_->v, row_lines_);
    } else if (++token_ != end_) {
      start(token_->k, row_lines_);
    } else {
      start(page_, page_lines_);
    }
    in_v_ = !in_v_;
  }

  const KvToken* token_;
  const KvToken* end_;
  const bool second_level_ = kernels().fetch_into_second_level;
  bool in_v_ = false;
  const std::byte* page_ = nullptr;
  const std::byte* at_ = nullptr;
  std::size_t left_ = 0, page_lines_ = 0, row_lines_, steps_, lines_, fetched_ = 0, step_ = 0;
};

// Four words of four rows in, the same words side by side out: 4 x 4 words change places.
inline void transpose(std::byte* const to[4], const std::byte* const from[4]) {
  const auto a = load<Word4>(from[0]), b = load<Word4>(from[1]);
  const auto c = load<Word4>(from[2]), d = load<Word4>(from[3]);
  const Word4 low_ab = __builtin_shufflevector(a, b, 0, 4, 1, 5);
  const Word4 low_cd = __builtin_shufflevector(c, d, 0, 4, 1, 5);
  const Word4 high_ab = __builtin_shufflevector(a, b, 2, 6, 3, 7);
  const Word4 high_cd = __builtin_shufflevector(c, d, 2, 6, 3, 7);
  const Word4 out[4] = {__builtin_shufflevector(low_ab, low_cd, 0, 1, 4, 5),
                        __builtin_shufflevector(low_ab, low_cd, 2, 3, 6, 7),
                        __builtin_shufflevector(high_ab, high_cd, 0, 1, 4, 5),
                        __builtin_shufflevector(high_ab, high_cd, 2, 3, 6, 7)};
  for (int i = 0; i < 4; ++i) std::memcpy(to[i], &out[i], sizeof out[i]);
}

// K is [groups][dim / P][tokens of the group] words, a word being P neighbouring dimensions of one
// token. A few rows at a time: rows in slots may lie so that a cache cannot hold many of them.
template <typename Word, bool kIn, typename Rows>
void move_k(std::byte* block, std::size_t words, std::size_t tokens, std::size_t offset,
            std::size_t n, Rows& rows, Ahead& ahead) {
  for (std::size_t t = offset; t < offset + n;) {
    const std::size_t first = t / kGroup * kGroup;
    const std::size_t line_bytes = std::min(kGroup, tokens - first) * sizeof(Word);
    const std::size_t end = std::min(first + kGroup, offset + n);
    std::byte* column = block + (first * words + t - first) * sizeof(Word);
    if (sizeof(Word) == 4 && t + 4 <= end) {
      ahead.advance(4);
      std::byte* row[4] = {rows[t - offset], rows[t - offset + 1], rows[t - offset + 2],
                           rows[t - offset + 3]};
      for (std::size_t w = 0; w < words; w += 4) {
        std::byte* line[4];
        for (std::size_t i = 0; i < 4; ++i) line[i] = column + (w + i) * line_bytes;
        if constexpr (kIn) transpose(line, row);
        else transpose(row, line);
        for (std::byte*& r : row) r += 4 * sizeof(Word);
      }
      t += 4;
      continue;
    }
    std::byte* row = rows[t - offset];
    for (std::size_t w = 0; w < words; ++w, row += sizeof(Word), column += line_bytes)
      std::memcpy(kIn ? column : row, kIn ? row : column, sizeof(Word));
    ++t;
  }
}

// V is [groups of dimensions][tokens / P][dimensions of the group][P].
template <typename T, std::size_t P, bool kIn, typename Rows>
void move_v(std::byte* block, std::size_t dim, std::size_t tokens, std::size_t offset,
            std::size_t n, Rows& rows, Ahead& ahead) {
  for (std::size_t t = offset; t < offset + n;) {
    const std::size_t at = t % P;
    const std::size_t count = std::min(P - at, offset + n - t);
    ahead.advance(count);
    for (std::size_t first = 0; first < dim; first += kGroup) {
      const std::size_t width = std::min(kGroup, dim - first);
      T* __restrict__ group = reinterpret_cast<T*>(block) + first * tokens + t / P * width * P;
      const auto row = [&](std::size_t i) {
        return reinterpret_cast<T*>(rows[t - offset + i]) + first;
      };
      // Whole groups in a form that compilers vectorise.
      if (P == 2 && count == 2) {
        T* __restrict__ a = row(0);
        T* __restrict__ b = row(1);
        for (std::size_t d = 0; d < width; ++d)
          if constexpr (kIn) {
            group[2 * d] = a[d];
            group[2 * d + 1] = b[d];
          } else {
            a[d] = group[2 * d];
            b[d] = group[2 * d + 1];
          }
        continue;
      }
      if (P == 4 && count == 4) {
        T *__restrict__ a = row(0), *__restrict__ b = row(1);
        T *__restrict__ c = row(2), *__restrict__ e = row(3);
        for (std::size_t d = 0; d < width; ++d)
          if constexpr (kIn) {
            group[4 * d] = a[d];
            group[4 * d + 1] = b[d];
            group[4 * d + 2] = c[d];
            group[4 * d + 3] = e[d];
          } else {
            a[d] = group[4 * d];
            b[d] = group[4 * d + 1];
            c[d] = group[4 * d + 2];
            e[d] = group[4 * d + 3];
          }
        continue;
      }
      for (std::size_t i = 0; i < count; ++i) {
        T* __restrict__ values = row(i);
        for (std::size_t d = 0; d < width; ++d)
          if constexpr (kIn) group[d * P + at + i] = values[d];
          else values[d] = group[d * P + at + i];
      }
    }
    t += count;
  }
}

// One head of a run, and what is moved after the run.
struct Head {
  std::byte* block;
  std::size_t offset, n;
  Ahead& ahead;
};

// Copies past the caches: nobody reads it soon, and memory need not be read before it is written.
void stream(std::byte* to, const std::byte* from, std::size_t bytes) {
#ifdef __SSE2__
  for (std::size_t i = 0; i < bytes; i += 16)
    _mm_stream_si128(reinterpret_cast<__m128i*>(to + i),
                     _mm_load_si128(reinterpret_cast<const __m128i*>(from + i)));
#else
  std::memcpy(to, from, bytes);
#endif
}

// Before what was streamed may be announced.
void finish_streams() {
#ifdef __SSE2__
  _mm_sfence();
#endif
}

// Tokens that fill a group of K and whole lines of V: put together in the first cache, then streamed.
template <typename T, std::size_t P, typename Word, typename Rows>
void stream_head(const Head& head, const shm::Geometry& g, Rows& k, Rows& v) {
  alignas(kLine) std::byte half[kRunTokens * kMaxDim * sizeof(T)];
  const std::size_t dim = g.head_dim, n = head.n;
  move_k<Word, true>(half, dim / P, n, 0, n, k, head.ahead);
  stream(head.block + head.offset * dim * sizeof(T), half, n * dim * sizeof(T));
  move_v<T, P, true>(half, dim, n, 0, n, v, head.ahead);
  std::byte* block = head.block + shm::v_offset(g);
  for (std::size_t first = 0; first < dim; first += kGroup) {
    const std::size_t width = std::min(kGroup, dim - first);
    stream(block + (first * g.page_tokens + head.offset * width) * sizeof(T),
           half + first * n * sizeof(T), n * width * sizeof(T));
  }
}

template <typename T, std::size_t P, typename Word, bool kIn, typename Rows>
void move_head(const Head& head, const shm::Geometry& g, Rows& k, Rows& v) {
  static_assert(sizeof(Word) == P * sizeof(T));
  const std::size_t group = std::min<std::size_t>(kGroup, g.page_tokens - head.offset);
  if (kIn && head.offset % kGroup == 0 && head.n == group)
    return stream_head<T, P, Word>(head, g, k, v);
  move_k<Word, kIn>(head.block, g.head_dim / P, g.page_tokens, head.offset, head.n, k, head.ahead);
  std::byte* v_block = head.block + shm::v_offset(g);
  move_v<T, P, kIn>(v_block, g.head_dim, g.page_tokens, head.offset, head.n, v, head.ahead);
}

// int8 values of some tokens' heads.
struct Int8Rows {
  std::uint8_t values[kRunTokens][kMaxDim];
  std::byte* operator[](std::size_t i) { return reinterpret_cast<std::byte*>(values[i]); }
};
// K is kept plus 128 (Int8Format::kKeyBias), as the dot product wants it.
constexpr std::uint8_t kFlipK = 0x80, kFlipV = 0;

// K and V of a head as int8, with a step for each row: see Kernels::quantise.
template <bool kIn>
void move_int8(const Head& head, const shm::Geometry& g, HeadRows& k, HeadRows& v) {
  const Kernels& kernel = kernels();
  Int8Rows k_values, v_values;
  // [K scales][V scales] of the block.
  float* k_scales = reinterpret_cast<float*>(head.block + shm::scales_offset(g)) + head.offset;
  float* v_scales = k_scales + g.page_tokens;
  if constexpr (kIn)
    for (std::size_t i = 0; i < head.n; ++i) {
      k_scales[i] = kernel.quantise(k[i], g.dtype, g.head_dim, kFlipK, k_values.values[i]);
      v_scales[i] = kernel.quantise(v[i], g.dtype, g.head_dim, kFlipV, v_values.values[i]);
    }
  move_head<std::uint8_t, 4, std::uint32_t, kIn>(head, g, k_values, v_values);
  if constexpr (!kIn)
    for (std::size_t i = 0; i < head.n; ++i) {
      kernel.dequantise(k_values.values[i], k_scales[i], kFlipK, g.dtype, g.head_dim, k[i]);
      kernel.dequantise(v_values.values[i], v_scales[i], kFlipV, g.dtype, g.head_dim, v[i]);
    }
}

template <bool kIn>
void move_run(const KvPages& pages, const KvToken* run, std::size_t n, const KvToken* next,
              std::size_t next_n) {
  const shm::Geometry& g = pages.geometry();
  const std::size_t row_bytes = std::size_t{g.head_dim} * shm::dtype_bytes(g.dtype);
  Ahead ahead(pages, next, next_n, !kIn, 2 * n * g.kv_heads);
  for (std::uint32_t h = 0; h < g.kv_heads; ++h) {
    Head head{pages.block(run->layer, run->page, h), run->offset, n, ahead};
    HeadRows k{run, &KvToken::k, h * row_bytes}, v{run, &KvToken::v, h * row_bytes};
    if (g.kv_dtype == shm::kInt8)
      move_int8<kIn>(head, g, k, v);
    else if (g.dtype == shm::kBfloat16)
      move_head<std::uint16_t, 2, std::uint32_t, kIn>(head, g, k, v);
    else if (g.dtype == shm::kFloat16)
      move_head<std::uint16_t, 1, std::uint16_t, kIn>(head, g, k, v);
    else
      move_head<std::uint32_t, 1, std::uint32_t, kIn>(head, g, k, v);
  }
}

// Within one group: a run never crosses into the next.
bool follows(const KvToken& a, const KvToken& b) {
  return b.layer == a.layer && b.page == a.page && b.offset == a.offset + 1 &&
         b.offset % kRunTokens != 0;
}

}  // namespace

void KvPages::write_run(const KvToken* run, std::size_t n, const KvToken* next,
                        std::size_t next_n) const {
  move_run<true>(*this, run, n, next, next_n);
  finish_streams();
}
void KvPages::read_run(const KvToken* run, std::size_t n, const KvToken* next,
                       std::size_t next_n) const {
  move_run<false>(*this, run, n, next, next_n);
}

void KvPages::for_runs(const std::vector<KvToken>& tokens, ThreadPool& threads, Run run) const {
  // One share a thread: only within a share the next run is fetched ahead.
  const std::size_t share =
      std::max(kRunTokens, tokens.size() / threads.threads() / kRunTokens * kRunTokens);
  std::atomic<std::size_t> next{0};
  const auto work = [&] {
    for (std::size_t at; (at = next.fetch_add(share)) < tokens.size();) {
      const std::size_t end = std::min(at + share, tokens.size());
      const auto length = [&](std::size_t begin) {
        std::size_t n = begin < end;
        while (begin + n < end && follows(tokens[begin + n - 1], tokens[begin + n])) ++n;
        return n;
      };
      std::size_t n = length(at);
      Ahead(*this, &tokens[at], n, run == &KvPages::read_run, 1).advance(1);
      for (std::size_t begin = at; begin < end;) {
        const std::size_t then = begin + n;
        const std::size_t then_n = length(then);
        (this->*run)(&tokens[begin], n, then_n ? &tokens[then] : nullptr, then_n);
        begin = then;
        n = then_n;
      }
    }
  };
  if (tokens.size() * page_stride() / g_.page_tokens < kSharedBytes) work();
  else threads.run(work);
}

void KvPages::write(const std::vector<KvToken>& tokens, ThreadPool& threads) const {
  for_runs(tokens, threads, &KvPages::write_run);
}

void KvPages::read(const std::vector<KvToken>& tokens, ThreadPool& threads) const {
  for_runs(tokens, threads, &KvPages::read_run);
}

}  // namespace omniserve
