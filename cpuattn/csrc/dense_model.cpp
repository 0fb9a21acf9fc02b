#include "dense_model.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

namespace omniserve {
namespace {

// gather, output projection, norm, gate-up, down, norm, QKV or head, heads or best tokens
constexpr std::uint32_t kStepsOfStage = 8;
// Rows of a unit of a step that works row by row.
constexpr std::uint32_t kRowsOfUnit = 4;
// Between rows in memory: rows whose distance is a power of two would share a set of the cache.
constexpr std::size_t kGap = 32;

// Of a packed gate-up matrix: each panel has 16 outputs of gate and the same 16 of up.
constexpr std::uint32_t kGateOutputs = kPanelOutputs / 2;

void require(bool ok, const char* name, long long value) {
  if (!ok)
    throw std::out_of_range(std::string(name) + " " + std::to_string(value) + " out of range");
}

std::size_t gate_up_outputs(const DenseShape& s) {
  return (s.intermediate + kGateOutputs - 1) / kGateOutputs * kPanelOutputs;
}

DenseShape checked(const DenseShape& s) {
  const bool sizes = s.layers != 0 && s.hidden != 0 && s.heads != 0 && s.kv_heads != 0 &&
                     s.intermediate != 0 && s.vocabulary != 0 && s.context_tokens != 0;
  if (!sizes) throw std::invalid_argument("every size of a model must be above 0");
  if (s.head_dim == 0 || s.head_dim % 16 != 0)
    throw std::invalid_argument("head_dim: must be a multiple of 16");
  if (s.dtype != shm::kFloat32 && s.dtype != shm::kBfloat16)
    throw std::invalid_argument("dtype: float32 or bfloat16");
  return s;
}

// Rows times a matrix, panel by panel.
struct Gemm {
  const DenseKernels* kernels;
  const PackedMatrix* matrix;
  const PackedMatrix* next;  // read after it, or null
  const void* x;
  std::size_t x_stride;
  std::uint32_t rows;
  std::byte* out;           // null if kBest stores nothing
  std::size_t out_stride;   // elements
  std::size_t panel_bytes;  // of out
  const float* bias;
  Finish finish;
  const BestTokens* best = nullptr;  // kBest only, as `wanted`
  const bool* wanted = nullptr;

  void run(const Turn& turn) const {
    const std::byte* ahead = !turn.last ? matrix->panel(turn.unit + 1)
                             : next != nullptr ? next->panel(turn.first_of(next->panels()))
                                               : nullptr;
    const std::uint32_t first = turn.unit * kPanelOutputs;
    const std::uint32_t left = matrix->outputs - first;
    kernels->gemm({matrix->panel(turn.unit), ahead, x, x_stride, matrix->inputs, rows,
                   out != nullptr ? out + turn.unit * panel_bytes : nullptr, out_stride,
                   left < kPanelOutputs ? left : kPanelOutputs,
                   bias != nullptr ? bias + first : nullptr, finish,
                   best != nullptr ? best->of(turn.worker) : nullptr, wanted, turn.unit});
  }
};

// Calls row_work(row) for each of some rows.
template <typename RowWork>
struct EachRow {
  RowWork row_work;
  std::uint32_t rows;

  std::uint32_t units() const { return (rows + kRowsOfUnit - 1) / kRowsOfUnit; }
  void run(const Turn& turn) const {
    const std::uint32_t first = turn.unit * kRowsOfUnit;
    for (std::uint32_t r = first; r < first + kRowsOfUnit && r < rows; ++r) row_work(r);
  }
};
template <typename RowWork>
EachRow(RowWork, std::uint32_t) -> EachRow<RowWork>;

}  // namespace

DenseModel::DenseModel(const DenseShape& shape, std::shared_ptr<ThreadPool> threads,
                       const float* cos, const float* sin)
    : shape_(checked(shape)),
      threads_(std::move(threads)),
      weights_(weight_bytes(), *threads_),
      scratch_(scratch_bytes(), *threads_),
      steps_(*threads_, kStepsOfStage),
      layers_(shape_.layers) {
  const std::size_t angles = std::size_t{shape_.context_tokens} * (shape_.head_dim / 2);
  cos_.assign(cos, cos + angles);
  sin_.assign(sin, sin + angles);
  take_layers();
  take_scratch();
}

std::size_t DenseModel::weight_bytes() const {
  const DenseShape& s = shape_;
  const auto elem = static_cast<std::uint32_t>(s.elem_bytes());
  const auto floats = [](std::size_t n) { return HugeMemory::rounded(padded(n) * sizeof(float)); };
  const std::size_t layer =
      packed_bytes(s.qkv_size(), s.hidden, elem) + packed_bytes(s.hidden, s.q_size(), elem) +
      packed_bytes(gate_up_outputs(s), s.hidden, elem) +
      packed_bytes(s.hidden, s.intermediate, elem) + 2 * floats(s.hidden) + floats(s.qkv_size()) +
      2 * floats(s.head_dim);
  return s.layers * layer + packed_bytes(s.vocabulary, s.hidden, elem) + floats(s.hidden);
}

void DenseModel::take_layers() {
  const DenseShape& s = shape_;
  const auto elem = static_cast<std::uint32_t>(s.elem_bytes());
  for (Layer& layer : layers_) {
    layer = {};
    layer.attention_out = take_matrix(weights_, s.hidden, s.q_size(), elem);
    layer.gate_up = take_matrix(weights_, gate_up_outputs(s), s.hidden, elem);
    layer.down = take_matrix(weights_, s.hidden, s.intermediate, elem);
    layer.qkv = take_matrix(weights_, s.qkv_size(), s.hidden, elem);
  }
  head_ = take_matrix(weights_, s.vocabulary, s.hidden, elem);
}

std::size_t DenseModel::scratch_bytes() const {
  const DenseShape& s = shape_;
  const std::size_t rows =
      padded(s.q_size()) + padded(s.hidden) + padded(s.intermediate) + 3 * kGap;
  const std::size_t sums = padded(s.hidden) + padded(s.qkv_size()) + 2 * kGap;
  const std::size_t best = threads_->threads() * sizeof(BestSums);
  return kUnitRows * (rows * s.elem_bytes() + sums * sizeof(float) + best);
}

void DenseModel::take_scratch() {
  const DenseShape& s = shape_;
  const auto rows = [&](std::size_t width) {
    const std::size_t stride = padded(width) + kGap;
    return Buffer<std::byte>{scratch_.take(kUnitRows * stride * s.elem_bytes()), stride};
  };
  const auto sums = [&](std::size_t width) {
    const std::size_t stride = padded(width) + kGap;
    std::byte* memory = scratch_.take(kUnitRows * stride * sizeof(float));
    return Buffer<float>{reinterpret_cast<float*>(memory), stride};
  };
  attention_ = rows(s.q_size());
  normed_ = rows(s.hidden);
  gated_ = rows(s.intermediate);
  residual_ = sums(s.hidden);
  qkv_ = sums(s.qkv_size());
  const std::uint32_t threads = threads_->threads();
  std::byte* best = scratch_.take(std::size_t{threads} * kUnitRows * sizeof(BestSums));
  best_ = {reinterpret_cast<BestSums*>(best), threads};
}

// Of the weights' memory; their padding is zero.
float* DenseModel::take_floats(std::size_t n) {
  return reinterpret_cast<float*>(weights_.take(padded(n) * sizeof(float)));
}

// Into `to`, or into new memory if that is null; null if there is nothing to copy.
float* DenseModel::copy_floats(float* to, const std::byte* from, std::size_t n) {
  if (from == nullptr) return nullptr;
  if (to == nullptr) to = take_floats(n);
  kernels().widen(from, n, to);
  return to;
}

void DenseModel::set_layer(std::uint32_t index, const LayerSource& source) {
  const DenseShape& s = shape_;
  require(index < s.layers, "layer", index);
  Layer& layer = layers_[index];
  const std::size_t elem = s.elem_bytes();
  const auto rows_of = [elem](const MatrixView& m, std::size_t outputs) {
    return [=](std::uint32_t i) { return i < outputs ? m.data + i * m.stride * elem : nullptr; };
  };
  pack(layer.qkv, s.hidden, *threads_, rows_of(source.qkv, s.qkv_size()));
  pack(layer.attention_out, s.q_size(), *threads_, rows_of(source.attention_out, s.hidden));
  pack(layer.down, s.intermediate, *threads_, rows_of(source.down, s.hidden));
  pack(layer.gate_up, s.hidden, *threads_, [&](std::uint32_t i) -> const std::byte* {
    const std::size_t neuron = i / kPanelOutputs * kGateOutputs + i % kGateOutputs;
    if (neuron >= s.intermediate) return nullptr;
    const bool up = i % kPanelOutputs >= kGateOutputs;
    const std::size_t row = up ? s.intermediate + neuron : neuron;
    return source.gate_up.data + row * source.gate_up.stride * elem;
  });
  layer.attention_norm = copy_floats(layer.attention_norm, source.attention_norm, s.hidden);
  layer.mlp_norm = copy_floats(layer.mlp_norm, source.mlp_norm, s.hidden);
  layer.qkv_bias = copy_floats(layer.qkv_bias, source.qkv_bias, s.qkv_size());
  layer.q_norm = copy_floats(layer.q_norm, source.q_norm, s.head_dim);
  layer.k_norm = copy_floats(layer.k_norm, source.k_norm, s.head_dim);
}

void DenseModel::set_ends(const MatrixView& embedding, const std::byte* final_norm,
                          const MatrixView& head) {
  const std::size_t elem = shape_.elem_bytes();
  embedding_ = embedding;
  final_norm_ = copy_floats(final_norm_, final_norm, shape_.hidden);
  pack(head_, shape_.hidden, *threads_, [&](std::uint32_t i) {
    return i < shape_.vocabulary ? head.data + i * head.stride * elem : nullptr;
  });
}

const DenseKernels& DenseModel::kernels() const {
  return shape_.dtype == shm::kBfloat16 ? dense_kernels().bfloat16 : dense_kernels().float32;
}

void DenseModel::check(const std::vector<RowPlace>& rows, std::uint32_t stage) const {
  if (embedding_.data == nullptr) throw std::invalid_argument("the embedding is not set");
  for (const std::uint32_t layer : {stage - 1, stage})
    if (layer < shape_.layers && layers_[layer].attention_norm == nullptr)
      throw std::invalid_argument("layer " + std::to_string(layer) + " is not set");
  for (const RowPlace& row : rows) {
    if (stage < shape_.layers)
      require(row.position >= 0 && row.position < shape_.context_tokens, "position", row.position);
    if (stage == 0)
      require(row.token >= 0 && row.token < shape_.vocabulary, "token", row.token);
  }
}

void DenseModel::run(std::uint32_t stage, const std::vector<RowPlace>& rows) {
  require(stage < shape_.layers, "stage", stage);
  check(rows, stage);
  for (std::size_t first = 0; first < rows.size(); first += kUnitRows)
    run_part(stage, rows.data() + first,
             static_cast<std::uint32_t>(std::min<std::size_t>(kUnitRows, rows.size() - first)),
             {});
}

void DenseModel::finish(const std::vector<RowPlace>& rows, const Outcome& outcome) {
  check(rows, shape_.layers);
  for (std::size_t first = 0; first < rows.size(); first += kUnitRows)
    run_part(shape_.layers, rows.data() + first,
             static_cast<std::uint32_t>(std::min<std::size_t>(kUnitRows, rows.size() - first)),
             outcome.from(first));
}

void DenseModel::run_part(std::uint32_t stage, const RowPlace* rows, std::uint32_t n,
                          const Outcome& outcome) {
  const DenseShape& s = shape_;
  const DenseKernels& k = kernels();
  const Layer* left = stage > 0 ? &layers_[stage - 1] : nullptr;
  const Layer* entered = stage < s.layers ? &layers_[stage] : nullptr;
  const std::size_t elem = s.elem_bytes();
  const auto row_of = [elem](const Buffer<std::byte>& b, std::uint32_t r) {
    return b.rows + r * b.stride * elem;
  };

  // All tasks live until the steps have run, also those of which this stage has no need.
  const EachRow gather{[&](std::uint32_t r) {
    const void* from = left != nullptr ? rows[r].residual
                                       : embedding_.data + rows[r].token * embedding_.stride * elem;
    k.widen(from, s.hidden, residual_.rows + r * residual_.stride);
    if (left != nullptr) std::memcpy(row_of(attention_, r), rows[r].attention, s.q_size() * elem);
  }, n};
  const auto add_to_residual = [&](const PackedMatrix& matrix, const PackedMatrix& next,
                                   const Buffer<std::byte>& x) {
    return Gemm{&k, &matrix, &next, x.rows, x.stride, n,
                reinterpret_cast<std::byte*>(residual_.rows), residual_.stride,
                kPanelOutputs * sizeof(float), nullptr, Finish::kAdd};
  };
  const auto norm = [&](const float* weight, std::uint32_t r) {
    k.norm(residual_.rows + r * residual_.stride, weight, s.hidden, s.norm_epsilon,
           row_of(normed_, r));
  };
  steps_.add(gather, gather.units());

  const Layer& l = left != nullptr ? *left : *entered;
  const PackedMatrix& last_matrix = entered != nullptr ? entered->qkv : head_;
  const Gemm out = add_to_residual(l.attention_out, l.gate_up, attention_);
  const EachRow mlp_norm{[&](std::uint32_t r) { norm(l.mlp_norm, r); }, n};
  const Gemm gate_up{&k, &l.gate_up, &l.down, normed_.rows, normed_.stride, n, gated_.rows,
                     gated_.stride, kGateOutputs * elem, nullptr, Finish::kGate};
  const Gemm down = add_to_residual(l.down, last_matrix, gated_);
  if (left != nullptr) {
    steps_.add(out, out.matrix->panels());
    steps_.add(mlp_norm, mlp_norm.units());
    steps_.add(gate_up, gate_up.matrix->panels());
    steps_.add(down, down.matrix->panels());
  }

  const EachRow last_norm{[&](std::uint32_t r) {
    norm(entered != nullptr ? entered->attention_norm : final_norm_, r);
    if (entered != nullptr)
      k.narrow(residual_.rows + r * residual_.stride, s.hidden, rows[r].residual);
    else
      best_.clear(r);
  }, n};
  const Gemm head{&k, &head_, nullptr, normed_.rows, normed_.stride, n,
                  reinterpret_cast<std::byte*>(outcome.logits), outcome.stride,
                  kPanelOutputs * sizeof(float), nullptr, Finish::kBest, &best_, outcome.wanted};
  const EachRow best{[&](std::uint32_t r) { outcome.best[r] = best_.token(r); }, n};
  const Gemm qkv{&k, &last_matrix, entered != nullptr ? &entered->attention_out : nullptr,
                 normed_.rows, normed_.stride, n, reinterpret_cast<std::byte*>(qkv_.rows),
                 qkv_.stride, kPanelOutputs * sizeof(float),
                 entered != nullptr ? entered->qkv_bias : nullptr, Finish::kStore};
  const EachRow heads{[&](std::uint32_t r) {
    const std::size_t angle = rows[r].position * (s.head_dim / 2);
    k.heads({s.heads, s.kv_heads, s.head_dim, entered->q_norm, entered->k_norm, s.norm_epsilon},
            qkv_.rows + r * qkv_.stride, &cos_[angle], &sin_[angle], rows[r].qkv);
  }, n};
  steps_.add(last_norm, last_norm.units());
  if (entered != nullptr) {
    steps_.add(qkv, qkv.matrix->panels());
    steps_.add(heads, heads.units());
  } else {
    steps_.add(head, head.matrix->panels());
    steps_.add(best, best.units());
  }
  steps_.run();
}

}  // namespace omniserve
