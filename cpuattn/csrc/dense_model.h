// The dense part of a model, a stage at a time: everything but attention and sampling.
//
// Stage l leaves layer l - 1 (output projection, residual, MLP) and enters layer l (norm, QKV,
// RoPE). Stage 0 begins with the embedding instead; stage `layers` ends with the LM head.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "best_tokens.h"
#include "dense_kernel.h"
#include "omniserve/shm/layout.h"
#include "packed_weights.h"
#include "steps.h"
#include "thread_pool.h"

namespace omniserve {

struct DenseShape {
  std::uint32_t layers;
  std::uint32_t hidden;
  std::uint32_t heads;
  std::uint32_t kv_heads;
  std::uint32_t head_dim;
  std::uint32_t intermediate;
  std::uint32_t vocabulary;
  std::uint32_t context_tokens;
  float norm_epsilon;
  std::uint32_t dtype;  // shm::kFloat32 or shm::kBfloat16, of weights and rows

  std::size_t elem_bytes() const { return shm::dtype_bytes(dtype); }
  std::size_t q_size() const { return std::size_t{heads} * head_dim; }
  std::size_t kv_size() const { return std::size_t{kv_heads} * head_dim; }
  std::size_t qkv_size() const { return q_size() + 2 * kv_size(); }
};

// Unpacked weights of a layer, of the model's dtype; matrices are [outputs][inputs].
struct LayerSource {
  const std::byte* attention_norm;
  MatrixView qkv;
  const std::byte* qkv_bias;  // null = none, also below
  const std::byte* q_norm;    // [head_dim]
  const std::byte* k_norm;
  MatrixView attention_out;
  const std::byte* mlp_norm;
  MatrixView gate_up;  // all of gate, then all of up
  MatrixView down;
};

// Where a row of a stage is read and written; all of the model's dtype.
struct RowPlace {
  void* residual;         // [hidden]; read but in stage 0, written but in the last
  const void* attention;  // [q_size]; read but in stage 0
  void* qkv;              // [qkv_size], written but in the last stage
  std::int64_t position;  // read but in the last stage
  std::int64_t token;     // read in stage 0
};

// What the last stage yields.
struct Outcome {
  std::int64_t* best;  // [rows]: the token with the largest logit; of equals the first
  const bool* wanted;  // [rows], whose logits are written; null for none
  float* logits;       // [rows][stride]; not looked at if `wanted` is null
  std::size_t stride;

  Outcome from(std::size_t row) const {
    if (wanted == nullptr) return {best + row, nullptr, nullptr, 0};
    return {best + row, wanted + row, logits + row * stride, stride};
  }
};

// Not thread-safe: one caller at a time. Allocates nothing after its construction.
class DenseModel {
 public:
  // cos, sin: [context_tokens][head_dim / 2]. Throws std::invalid_argument.
  DenseModel(const DenseShape& shape, std::shared_ptr<ThreadPool> threads, const float* cos,
             const float* sin);

  const DenseShape& shape() const { return shape_; }

  void set_layer(std::uint32_t layer, const LayerSource& source);
  // The embedding is not copied: it must outlive the model.
  void set_ends(const MatrixView& embedding, const std::byte* final_norm, const MatrixView& head);

  // Runs `stage` < layers. Throws std::out_of_range and std::invalid_argument before it writes.
  void run(std::uint32_t stage, const std::vector<RowPlace>& rows);
  // Runs stage `layers`.
  void finish(const std::vector<RowPlace>& rows, const Outcome& outcome);

 private:
  struct Layer {
    PackedMatrix qkv, attention_out, gate_up, down;
    float *attention_norm, *mlp_norm, *qkv_bias, *q_norm, *k_norm;  // null = has none, or not set
  };
  // Rows between two steps. A row is padded, and its padding meets zero weights only.
  template <typename T>
  struct Buffer {
    T* rows;
    std::size_t stride;  // elements of the model's dtype where T is std::byte
  };

  std::size_t weight_bytes() const;
  std::size_t scratch_bytes() const;
  void take_layers();
  void take_scratch();
  float* take_floats(std::size_t n);
  float* copy_floats(float* to, const std::byte* from, std::size_t n);
  void check(const std::vector<RowPlace>& rows, std::uint32_t stage) const;
  const DenseKernels& kernels() const;
  // At most kUnitRows rows; outcome: of the last stage.
  void run_part(std::uint32_t stage, const RowPlace* rows, std::uint32_t n,
                const Outcome& outcome);

  DenseShape shape_;
  std::shared_ptr<ThreadPool> threads_;
  HugeMemory weights_;
  HugeMemory scratch_;
  Steps steps_;
  std::vector<Layer> layers_;
  MatrixView embedding_{};
  PackedMatrix head_;
  float* final_norm_ = nullptr;
  std::vector<float> cos_, sin_;
  Buffer<std::byte> attention_, normed_, gated_;
  Buffer<float> residual_, qkv_;
  BestTokens best_;
};

}  // namespace omniserve
