// Matrix products of the dense kernels with nothing of Python in the time.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "dense_kernel.h"
#include "packed_weights.h"
#include "probes.h"
#include "steps.h"

namespace omniserve {
namespace {

namespace nb = nanobind;

// Copies of a bfloat16 matrix; every call multiplies with the next, so that no cache has it.
class GemmProbe {
 public:
  GemmProbe(std::size_t outputs, std::size_t inputs, std::uint32_t copies, unsigned threads)
      : pool_(threads, {}, kSpinUs),
        memory_(copies * packed_bytes(outputs, inputs, 2) +
                    kUnitRows * (padded(inputs) + kGap) * 2 +
                    kUnitRows * (padded(outputs) + kGap) * sizeof(float),
                pool_),
        steps_(pool_, 1) {
    if (copies == 0) throw std::invalid_argument("copies: at least 1");
    const std::vector<std::uint16_t> row(inputs, 0x3F80);  // ones
    for (std::uint32_t i = 0; i < copies; ++i) {
      matrices_.push_back(take_matrix(memory_, outputs, inputs, 2));
      pack(matrices_.back(), inputs, pool_, [&](std::uint32_t output) {
        return output < outputs ? reinterpret_cast<const std::byte*>(row.data()) : nullptr;
      });
    }
    x_stride_ = padded(inputs) + kGap;
    out_stride_ = padded(outputs) + kGap;
    x_ = memory_.take(kUnitRows * x_stride_ * 2);
    out_ = memory_.take(kUnitRows * out_stride_ * sizeof(float));
    for (std::size_t i = 0; i < kUnitRows * x_stride_; ++i) std::memcpy(x_ + 2 * i, row.data(), 2);
  }

  // Seconds of one product of `rows` rows.
  double run(std::uint32_t rows) {
    const PackedMatrix& matrix = matrices_[next_];
    next_ = (next_ + 1) % matrices_.size();
    const Stopwatch watch;
    for (std::uint32_t done = 0; done < rows; done += kUnitRows) {
      const Task task{*this, matrix, matrices_[next_], std::min(rows - done, kUnitRows)};
      steps_.add(task, matrix.panels());
      steps_.run();
    }
    return watch.seconds();
  }

 private:
  static constexpr std::size_t kGap = 32;

  struct Task {
    const GemmProbe& probe;
    const PackedMatrix& matrix;
    const PackedMatrix& next;
    std::uint32_t rows;

    void run(const Turn& turn) const {
      const std::byte* ahead = turn.last ? next.panel(turn.first_of(next.panels()))
                                         : matrix.panel(turn.unit + 1);
      std::byte* out = probe.out_ + turn.unit * kPanelOutputs * sizeof(float);
      dense_kernels().bfloat16.gemm({matrix.panel(turn.unit), ahead, probe.x_, probe.x_stride_,
                                     matrix.inputs, rows, out, probe.out_stride_, kPanelOutputs,
                                     nullptr, Finish::kStore});
    }
  };

  ThreadPool pool_;
  HugeMemory memory_;
  Steps steps_;
  std::vector<PackedMatrix> matrices_;
  std::size_t next_ = 0;
  std::size_t x_stride_, out_stride_;
  std::byte* x_;
  std::byte* out_;
};

}  // namespace

void bind_dense_bench(nb::module_& m) {
  using namespace nb::literals;
  nb::class_<GemmProbe>(m, "GemmProbe")
      .def(nb::init<std::size_t, std::size_t, std::uint32_t, unsigned>(), nb::kw_only(),
           "outputs"_a, "inputs"_a, "copies"_a, "threads"_a)
      .def("run", &GemmProbe::run, "rows"_a, nb::call_guard<nb::gil_scoped_release>());
}

}  // namespace omniserve
