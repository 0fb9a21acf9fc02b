#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/tuple.h>

#include <memory>
#include <optional>
#include <tuple>
#include <utility>

#include "bindings.h"
#include "dense_model.h"

namespace omniserve {
namespace {

using Int64s = nb::ndarray<const std::int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Floats = nb::ndarray<float, nb::ndim<2>, nb::device::cpu>;
using Tokens = nb::ndarray<std::int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Flags = nb::ndarray<const bool, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Angles = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Vector = nb::ndarray<nb::ro, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

// Rows of attention outputs, and of q, k and v side by side: a device's or a server's.
struct Slots {
  Matrix attention;
  Matrix qkv;
};

// Rows of one owner, alive for as long as it is. `slots` are looked up by `owners` of a part.
struct StageRows {
  Matrix residual;
  std::vector<std::shared_ptr<Slots>> slots;
};

// Owner of the rows, which of its residuals (null: all), which of its slots (null: the same of the
// first ones), and of each row its position and its token where the stage needs them.
using Part = std::tuple<std::shared_ptr<StageRows>, std::optional<Int64s>, std::optional<Int32s>,
                        std::optional<Int32s>, std::optional<Int64s>, std::optional<Int64s>>;

std::byte* row_at(const Rows& rows, std::int64_t index, std::size_t elem, const char* name) {
  if (index < 0 || index >= static_cast<std::int64_t>(rows.rows))
    throw std::out_of_range(std::string(name) + " " + std::to_string(index) + " out of range");
  return static_cast<std::byte*>(rows.data) + index * rows.stride * elem;
}

class BoundModel {
 public:
  BoundModel(const DenseShape& shape, std::shared_ptr<ThreadPool> threads, const Angles& cos,
             const Angles& sin)
      : model_(checked(shape, cos, sin), std::move(threads), cos.data(), sin.data()) {}

  void set_layer(std::uint32_t layer, const Vector& attention_norm, const ConstMatrix& qkv,
                 const ConstMatrix& attention_out, const Vector& mlp_norm,
                 const ConstMatrix& gate_up, const ConstMatrix& down,
                 const std::optional<Vector>& qkv_bias, const std::optional<Vector>& q_norm,
                 const std::optional<Vector>& k_norm) {
    const DenseShape& s = model_.shape();
    const LayerSource source{
        vector(attention_norm, s.hidden, "attention_norm"),
        matrix(qkv, s.qkv_size(), s.hidden, "qkv"),
        qkv_bias ? vector(*qkv_bias, s.qkv_size(), "qkv_bias") : nullptr,
        q_norm ? vector(*q_norm, s.head_dim, "q_norm") : nullptr,
        k_norm ? vector(*k_norm, s.head_dim, "k_norm") : nullptr,
        matrix(attention_out, s.hidden, s.q_size(), "attention_out"),
        vector(mlp_norm, s.hidden, "mlp_norm"),
        matrix(gate_up, std::size_t{2} * s.intermediate, s.hidden, "gate_up"),
        matrix(down, s.hidden, s.intermediate, "down")};
    nb::gil_scoped_release release;
    model_.set_layer(layer, source);
  }

  void set_ends(const ConstMatrix& embedding, const Vector& final_norm, const ConstMatrix& head) {
    const DenseShape& s = model_.shape();
    const MatrixView rows = matrix(embedding, s.vocabulary, s.hidden, "embedding");
    const std::byte* norm = vector(final_norm, s.hidden, "final_norm");
    const MatrixView outputs = matrix(head, s.vocabulary, s.hidden, "head");
    embedding_ = embedding;
    nb::gil_scoped_release release;
    model_.set_ends(rows, norm, outputs);
  }

  void run(std::uint32_t stage, const std::vector<Part>& parts) {
    place_rows(parts, stage == 0, false);
    nb::gil_scoped_release release;
    model_.run(stage, places_);
  }

  void finish(const std::vector<Part>& parts, const Tokens& best,
              const std::optional<Floats>& logits, const std::optional<Flags>& wanted) {
    place_rows(parts, false, true);
    const std::size_t rows = places_.size();
    if (best.size() < rows) throw std::invalid_argument("best: must have room for all rows");
    if (logits.has_value() != wanted.has_value())
      throw std::invalid_argument("logits, wanted: give both or none");
    if (wanted && wanted->size() != rows)
      throw std::invalid_argument("wanted: must be as many as rows");
    if (logits && (logits->shape(0) < rows || logits->shape(1) != model_.shape().vocabulary ||
                   logits->stride(1) != 1))
      throw std::invalid_argument("logits: shape must be [rows, vocabulary], inner stride 1");
    Outcome outcome{best.data(), nullptr, nullptr, 0};
    if (wanted)
      outcome = {best.data(), wanted->data(), logits->data(),
                 static_cast<std::size_t>(logits->stride(0))};
    nb::gil_scoped_release release;
    model_.finish(places_, outcome);
  }

 private:
  static const DenseShape& checked(const DenseShape& s, const Angles& cos, const Angles& sin) {
    for (const Angles& angles : {cos, sin})
      if (angles.shape(0) != s.context_tokens || angles.shape(1) != s.head_dim / 2)
        throw std::invalid_argument("cos, sin: shape must be [context_tokens, head_dim / 2]");
    return s;
  }

  MatrixView matrix(const ConstMatrix& m, std::size_t outputs, std::size_t inputs,
                    const char* name) const {
    const Rows rows = rows_of(m, model_.shape().dtype, name);
    if (rows.rows != outputs || rows.columns != inputs)
      throw std::invalid_argument(std::string(name) + ": shape must be [" +
                                  std::to_string(outputs) + ", " + std::to_string(inputs) + "]");
    return {static_cast<const std::byte*>(rows.data), rows.stride};
  }

  const std::byte* vector(const Vector& v, std::size_t n, const char* name) const {
    if (!is_of(v.dtype(), model_.shape().dtype) || v.size() != n)
      throw std::invalid_argument(std::string(name) + ": must be " + std::to_string(n) + " of " +
                                  dtype_name(model_.shape().dtype));
    return static_cast<const std::byte*>(v.data());
  }

  Rows columns_of(const Matrix& array, std::size_t columns, const char* name) const {
    const Rows rows = rows_of(array, model_.shape().dtype, name);
    if (rows.columns != columns)
      throw std::invalid_argument(std::string(name) + ": columns must be " +
                                  std::to_string(columns));
    return rows;
  }

  void place_rows(const std::vector<Part>& parts, bool first, bool last) {
    places_.clear();
    for (const Part& part : parts) place_part(part, first, last);
  }

  void place_part(const Part& part, bool first, bool last) {
    const auto& [owner, rows, owners, slots, positions, tokens] = part;
    const DenseShape& s = model_.shape();
    const Rows residual = columns_of(owner->residual, s.hidden, "residual");
    slots_.clear();
    for (const auto& pair : owner->slots)
      slots_.push_back({columns_of(pair->attention, s.q_size(), "attention"),
                        columns_of(pair->qkv, s.qkv_size(), "qkv")});
    const std::size_t n = rows ? rows->size() : residual.rows;
    if ((owners && owners->size() != n) || (slots && slots->size() != n))
      throw std::invalid_argument("owners, slots: must be as many as rows");
    if (!last && (!positions || positions->size() != n))
      throw std::invalid_argument("positions: must be as many as rows");
    if (first && (!tokens || tokens->size() != n))
      throw std::invalid_argument("tokens: must be as many as rows");
    const std::size_t elem = s.elem_bytes();
    for (std::size_t i = 0; i < n; ++i) {
      const std::int64_t row = rows ? rows->data()[i] : static_cast<std::int64_t>(i);
      const std::int64_t slot = slots ? slots->data()[i] : row;
      const std::int64_t of = owners ? owners->data()[i] : 0;
      if (of < 0 || of >= static_cast<std::int64_t>(slots_.size()))
        throw std::out_of_range("owner " + std::to_string(of) + " out of range");
      places_.push_back({row_at(residual, row, elem, "row"),
                         row_at(slots_[of].first, slot, elem, "slot"),
                         row_at(slots_[of].second, slot, elem, "slot"),
                         last ? 0 : positions->data()[i], first ? tokens->data()[i] : 0});
    }
  }

  DenseModel model_;
  ConstMatrix embedding_;  // read where it is
  // Kept between calls for their memory.
  std::vector<RowPlace> places_;
  std::vector<std::pair<Rows, Rows>> slots_;
};

}  // namespace

void bind_dense(nb::module_& m) {
  using namespace nb::literals;
  nb::class_<Slots>(m, "Slots")
      .def(
          "__init__",
          [](Slots* self, Matrix attention, Matrix qkv) {
            new (self) Slots{std::move(attention), std::move(qkv)};
          },
          "attention"_a, "qkv"_a);
  nb::class_<StageRows>(m, "StageRows")
      .def(
          "__init__",
          [](StageRows* self, Matrix residual, std::vector<std::shared_ptr<Slots>> slots) {
            new (self) StageRows{std::move(residual), std::move(slots)};
          },
          "residual"_a, "slots"_a);
  nb::class_<BoundModel>(m, "DenseModel")
      .def(
          "__init__",
          [](BoundModel* self, std::uint32_t layers, std::uint32_t hidden, std::uint32_t heads,
             std::uint32_t kv_heads, std::uint32_t head_dim, std::uint32_t intermediate,
             std::uint32_t vocabulary, std::uint32_t context_tokens, float norm_epsilon,
             const std::string& dtype, std::shared_ptr<ThreadPool> threads, const Angles& cos,
             const Angles& sin) {
            const DenseShape shape{layers,     hidden,         heads,        kv_heads,
                                   head_dim,   intermediate,   vocabulary,   context_tokens,
                                   norm_epsilon, dtype_code(dtype)};
            new (self) BoundModel(shape, std::move(threads), cos, sin);
          },
          nb::kw_only(), "layers"_a, "hidden"_a, "heads"_a, "kv_heads"_a, "head_dim"_a,
          "intermediate"_a, "vocabulary"_a, "context_tokens"_a, "norm_epsilon"_a, "dtype"_a,
          "threads"_a, "cos"_a, "sin"_a)
      .def("set_layer", &BoundModel::set_layer, "layer"_a, nb::kw_only(), "attention_norm"_a,
           "qkv"_a, "attention_out"_a, "mlp_norm"_a, "gate_up"_a, "down"_a,
           "qkv_bias"_a = nb::none(), "q_norm"_a = nb::none(), "k_norm"_a = nb::none())
      .def("set_ends", &BoundModel::set_ends, nb::kw_only(), "embedding"_a, "final_norm"_a,
           "head"_a)
      .def("run", &BoundModel::run, "stage"_a, "parts"_a)
      .def("finish", &BoundModel::finish, "parts"_a, "best"_a, "logits"_a = nb::none(),
           "wanted"_a = nb::none());
}

}  // namespace omniserve
