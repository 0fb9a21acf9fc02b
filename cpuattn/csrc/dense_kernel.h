// Matrix products and what lies between them in a transformer layer, one implementation for several
// instruction sets. Nothing here knows about models or threads.
//
// A packed matrix is cut into panels of kPanelOutputs outputs. Within a panel the outputs' values
// for kPacking neighbouring inputs lie side by side, and all outputs follow for these inputs, and
// then the next inputs: [inputs / kPacking][kPanelOutputs][kPacking]. kPacking is 2 in bfloat16 and
// 1 in float32. So a panel is read once, from its first byte to its last.
//
// Every output is one float32 sum over the inputs in their order, whatever the rows, the blocks
// and the threads: a row's results do not depend on its batch.
#pragma once

#include <cstddef>
#include <cstdint>

namespace omniserve {

constexpr std::uint32_t kPanelOutputs = 32;
// Rows and columns in memory of ours are padded to a multiple of this, with zeros.
constexpr std::uint32_t kPad = 32;
// Rows of one unit at most; a larger batch goes through a stage in parts.
constexpr std::uint32_t kUnitRows = 512;

constexpr std::size_t padded(std::size_t n) { return (n + kPad - 1) / kPad * kPad; }

// What becomes of the sums.
enum class Finish : std::uint32_t {
  kStore,  // float32 out = sum + bias
  kAdd,    // float32 out += sum
  kGate,   // out i = silu(sum i) * sum i + 16, for i < 16, in the dtype of the weights
  kBest,   // best = the larger of best and sum; float32 out = sum, for rows where it is wanted
};

// The largest sum of a row so far, for each output of a panel, and the panel that has it: of equals
// the first. A sum that is not a number is none.
struct BestSums {
  float sum[kPanelOutputs];
  std::uint32_t panel[kPanelOutputs];
};

// Some rows times one panel.
struct GemmUnit {
  const std::byte* panel;
  const std::byte* next;  // the panel that this thread reads next, or null
  const void* x;          // [rows][x_stride], of the dtype of the weights
  std::size_t x_stride;   // elements
  std::uint32_t inputs;   // padded
  std::uint32_t rows;
  void* out;               // [rows][out_stride], the panel's first column
  std::size_t out_stride;  // elements
  std::uint32_t columns;   // outputs of the panel that exist; no others are written
  const float* bias;       // [kPanelOutputs] of the panel, or null; kStore only
  Finish finish;
  BestSums* best = nullptr;      // [rows]; kBest only, as all that follows
  const bool* wanted = nullptr;  // [rows], whose sums go to `out`; null for none
  std::uint32_t index = 0;       // of the panel
};

// Heads of a row of q, k and v.
struct HeadsTask {
  std::uint32_t heads;
  std::uint32_t kv_heads;
  std::uint32_t head_dim;  // a multiple of 16
  const float* q_norm;     // [head_dim] weights of an RMS norm of each head, or null
  const float* k_norm;
  float epsilon;
};

// Functions on rows, for one dtype. `n` needs no padding where it is not said.
struct DenseKernels {
  void (*gemm)(const GemmUnit& unit);
  // float32 [padded(n)] from a row: zero beyond n.
  void (*widen)(const void* row, std::size_t n, float* out);
  void (*narrow)(const float* row, std::size_t n, void* out);
  // RMS norm. x, weight: [padded n], zero beyond n; writes padded(n) values.
  void (*norm)(const float* x, const float* weight, std::size_t n, float epsilon, void* out);
  // Norm of heads where wanted, then rotation of q's and k's halves by (cos, sin)[head_dim / 2], in
  // float32, in place; then the row is narrowed to out.
  void (*heads)(const HeadsTask& task, float* qkv, const float* cos, const float* sin, void* out);
};

struct DenseKernelSet {
  DenseKernels float32;
  DenseKernels bfloat16;
};

// The kernels in use, see dispatch.h.
const DenseKernelSet& dense_kernels();

namespace kernel_base { extern const DenseKernelSet kDense; }
namespace kernel_v3 { extern const DenseKernelSet kDense; }
namespace kernel_v4 { extern const DenseKernelSet kDense; }
namespace kernel_v4_dot { extern const DenseKernelSet kDense; }
namespace kernel_zen4 { extern const DenseKernelSet kDense; }

}  // namespace omniserve
