// Attention over pages with nothing of Python in the time.
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "attend.h"
#include "floats.h"
#include "paged_kv.h"
#include "probes.h"
#include "segment.h"

namespace omniserve {
namespace {

namespace nb = nanobind;

std::uint32_t code_of(const std::string& name) {
  for (const auto& [code, known] : {std::pair{shm::kFloat32, "float32"},
                                    {shm::kBfloat16, "bfloat16"},
                                    {shm::kFloat16, "float16"},
                                    {shm::kInt8, "int8"}})
    if (name == known) return code;
  throw std::invalid_argument("no dtype " + name);
}

// Some sets of sequences of one length, bfloat16 rows. Each call takes the next set, so that no
// cache holds what it reads. Pages of a sequence follow one another, as a page pool gives them to
// it while it can, or lie anywhere (`fragmented`).
class AttentionProbe {
 public:
  AttentionProbe(std::uint32_t heads, std::uint32_t kv_heads, std::uint32_t head_dim,
                 const std::string& kv_dtype, std::uint32_t page_tokens, std::uint32_t context,
                 std::uint32_t rows, std::uint32_t batch, std::uint32_t sets, unsigned threads,
                 bool fragmented)
      : heads_(heads),
        rows_(rows),
        context_(context),
        batch_(batch),
        sets_(sets),
        max_pages_((context + rows + page_tokens - 1) / page_tokens),
        kv_(1, kv_heads, head_dim, page_tokens, max_pages_ * batch * sets, shm::kBfloat16,
            code_of(kv_dtype), std::make_shared<ThreadPool>(threads, std::vector<int>{}, kSpinUs)) {
    tables_.resize(std::size_t{max_pages_} * batch * sets);
    std::iota(tables_.begin(), tables_.end(), 0);
    std::mt19937 draw(1);
    if (fragmented) std::shuffle(tables_.begin(), tables_.end(), draw);
    fill(draw);
    const std::size_t q_size = std::size_t{heads} * head_dim;
    q_ = random_rows(draw, std::size_t{batch} * rows * q_size);
    out_.resize(q_.size());
    for (std::uint32_t b = 0; b < batch; ++b) {
      first_row_.push_back(static_cast<std::int32_t>(b * rows));
      n_rows_.push_back(static_cast<std::int32_t>(rows));
      first_position_.push_back(static_cast<std::int32_t>(context - (rows == 1 ? 1 : 0)));
    }
  }

  // KV bytes that a call reads: every page of a set, up to the tokens that a row sees.
  std::uint64_t kv_bytes() const {
    const shm::Geometry& g = kv_.geometry();
    const std::uint64_t token = shm::block_bytes(g) * g.kv_heads / g.page_tokens;
    return token * (context_ + (rows_ == 1 ? 0 : rows_)) * batch_;
  }

  // Seconds of one call.
  double run() {
    const shm::Geometry& g = kv_.geometry();
    const std::size_t columns = std::size_t{heads_} * g.head_dim;
    const std::size_t rows = std::size_t{batch_} * rows_;
    set_ = (set_ + 1) % sets_;
    const std::int32_t* tables = tables_.data() + std::size_t{set_} * batch_ * max_pages_;
    const Stopwatch watch;
    kv_.attend(0, {q_.data(), rows, columns, columns}, {out_.data(), rows, columns, columns},
               tables, max_pages_, first_row_.data(), n_rows_.data(), first_position_.data(),
               batch_, {});
    return watch.seconds();
  }

 private:
  static std::vector<Bf16> random_rows(std::mt19937& draw, std::size_t n) {
    std::normal_distribution<float> normal;
    std::vector<Bf16> values(n);
    for (Bf16& v : values) from_float(normal(draw), v);
    return values;
  }

  // Every page holds the same random tokens, elsewhere in memory.
  void fill(std::mt19937& draw) {
    const shm::Geometry& g = kv_.geometry();
    const std::size_t columns = std::size_t{g.kv_heads} * g.head_dim;
    auto k = random_rows(draw, columns * g.page_tokens);
    auto v = random_rows(draw, columns * g.page_tokens);
    for (std::uint32_t t = 0; t < g.page_tokens; ++t)
      kv_.pages().write({0, 0, t, reinterpret_cast<std::byte*>(k.data() + t * columns),
                         reinterpret_cast<std::byte*>(v.data() + t * columns)});
    const std::size_t page_bytes = kv_.pages().page_stride();
    for (std::uint32_t page = 1; page < g.pages; ++page)
      std::memcpy(kv_.pages().block(0, page, 0), kv_.pages().block(0, 0, 0), page_bytes);
  }

  std::uint32_t heads_, rows_, context_, batch_, sets_, max_pages_;
  PagedKv kv_;
  std::vector<std::int32_t> tables_, first_row_, n_rows_, first_position_;
  std::vector<Bf16> q_, out_;
  std::uint32_t set_ = 0;
};

// A server's arena, mapped by this process too: attends what the server attends, where it lies, while
// the server does nothing.
class ArenaProbe {
 public:
  ArenaProbe(const std::string& path, unsigned threads)
      : mapping_(path), pool_(threads, {}, kSpinUs) {
    const shm::Geometry geometry = geometry_of(mapping_, path);
    segment_ = SegmentView(mapping_.data(), geometry);
    pages_ = KvPages(segment_.kv(), geometry);
  }

  // Seconds of attention of one row of every sequence, its last token's, over what `layer` has. All
  // have the query of slot 0.
  double run(std::uint32_t layer) {
    const shm::Geometry& g = segment_.geometry();
    if (layer >= g.layers) throw std::out_of_range("layer " + std::to_string(layer));
    const RowParts parts(g);
    const std::size_t elem = shm::dtype_bytes(g.dtype);
    const std::size_t row_bytes = std::size_t{g.heads} * g.head_dim * elem;
    out_.resize(g.max_sequences * row_bytes);
    rows_.clear();
    for (std::uint32_t s = 0; s < g.max_sequences; ++s) {
      const std::uint32_t tokens = segment_.written_len(s)[layer].load(std::memory_order_acquire);
      if (tokens == 0) continue;
      rows_.push_back({segment_.page_table(s), segment_.slab_row(0) + parts.q * elem,
                       out_.data() + s * row_bytes, 0, 0, 1, tokens - 1});
    }
    const Stopwatch watch;
    attention_.run(pages_, layer, g.heads, rows_, {}, pool_);
    return watch.seconds();
  }

 private:
  Mapping mapping_;
  ThreadPool pool_;
  SegmentView segment_;
  KvPages pages_;
  Attention attention_;
  std::vector<Segment> rows_;
  std::vector<std::byte> out_;
};

}  // namespace

void bind_attention(nb::module_& m) {
  using namespace nb::literals;
  using Release = nb::call_guard<nb::gil_scoped_release>;
  nb::class_<AttentionProbe>(m, "AttentionProbe")
      .def(nb::init<std::uint32_t, std::uint32_t, std::uint32_t, const std::string&, std::uint32_t,
                    std::uint32_t, std::uint32_t, std::uint32_t, std::uint32_t, unsigned,
                    bool>(),
           nb::kw_only(), "heads"_a, "kv_heads"_a, "head_dim"_a, "kv_dtype"_a, "page_tokens"_a,
           "context"_a, "rows"_a, "batch"_a, "sets"_a, "threads"_a,
           "fragmented"_a = false)
      .def_prop_ro("kv_bytes", &AttentionProbe::kv_bytes)
      .def("run", &AttentionProbe::run, Release());
  nb::class_<ArenaProbe>(m, "ArenaProbe")
      .def(nb::init<const std::string&, unsigned>(), "path"_a, "threads"_a)
      .def("run", &ArenaProbe::run, "layer"_a, Release());
}

}  // namespace omniserve
