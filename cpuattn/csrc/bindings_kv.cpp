#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/variant.h>

#include <cstring>
#include <memory>
#include <variant>

#include "bindings.h"
#include "dispatch.h"
#include "floats.h"
#include "paged_kv.h"
#include "worker_link.h"

namespace omniserve {
namespace {

void append_rows(PagedKv& kv, std::uint32_t layer, const ConstMatrix& k, const ConstMatrix& v,
            const Int32s& pages, const Int32s& offsets) {
  const Rows k_rows = rows_of(k, kv.geometry().dtype, "k");
  const Rows v_rows = rows_of(v, kv.geometry().dtype, "v");
  require_same_length({k_rows.rows, v_rows.rows, pages.size(), offsets.size()});
  const std::size_t columns = std::size_t{kv.geometry().kv_heads} * kv.geometry().head_dim;
  if (k_rows.columns != columns || v_rows.columns != columns)
    throw std::invalid_argument("k, v: columns must be kv_heads * head_dim");
  nb::gil_scoped_release release;
  kv.append(layer, k_rows, v_rows, pages.data(), offsets.data());
}

void attend_rows(PagedKv& kv, std::uint32_t layer, const ConstMatrix& q, const Matrix& out,
            const Int32Table& tables, const Int32s& first_row, const Int32s& n_rows,
                 const Int32s& first_position, std::uint32_t window, float softcap,
                 const std::vector<float>& sinks) {
  const Rows q_rows = rows_of(q, kv.geometry().dtype, "q");
  const Rows out_rows = rows_of(out, kv.geometry().dtype, "out");
  require_same_length(
      {tables.shape(0), first_row.size(), n_rows.size(), first_position.size()});
  const shm::Geometry& g = kv.geometry();
  const std::size_t kv_columns = std::size_t{g.kv_heads} * g.head_dim;
  if (q_rows.columns == 0 || q_rows.columns % kv_columns || q_rows.columns / kv_columns > kMaxGroup)
    throw std::invalid_argument("q: columns must be 1 to 16 times kv_heads * head_dim");
  if (out_rows.rows != q_rows.rows || out_rows.columns != q_rows.columns)
    throw std::invalid_argument("out: shape must be that of q");
  if (!(softcap >= 0)) throw std::invalid_argument("softcap: must not be negative");
  if (sinks.size() != 0 && sinks.size() * g.head_dim != q_rows.columns)
    throw std::invalid_argument("sinks: one for each head, or none");
  const AttendOptions options{window, softcap, sinks.size() != 0 ? sinks.data() : nullptr};
  nb::gil_scoped_release release;
  kv.attend(layer, q_rows, out_rows, tables.data(), tables.shape(1), first_row.data(),
            n_rows.data(), first_position.data(), tables.shape(0), options);
}

void export_tokens(PagedKv& kv, const WorkerLink& link, const Int32s& layers,
                   const Int32s& pages, const Int32s& offsets, const Int32s& slots,
                   const Int32s& indices) {
  require_same_length(
      {layers.size(), pages.size(), offsets.size(), slots.size(), indices.size()});
  nb::gil_scoped_release release;
  kv.export_tokens(link.segment(), layers.data(), pages.data(), offsets.data(), slots.data(),
                   indices.data(), slots.size());
}

void import_tokens(PagedKv& kv, const WorkerLink& link, const Int32s& layers,
                   const Int32s& pages, const Int32s& offsets, const Int32s& slots,
                   const Int32s& indices) {
  require_same_length(
      {layers.size(), pages.size(), offsets.size(), slots.size(), indices.size()});
  nb::gil_scoped_release release;
  kv.import_tokens(link.segment(), layers.data(), pages.data(), offsets.data(), slots.data(),
                   indices.data(), slots.size());
}

std::vector<float> widen(const std::vector<std::byte>& row, std::uint32_t dtype) {
  std::vector<float> out(row.size() / shm::dtype_bytes(dtype));
  for (std::size_t i = 0; i < out.size(); ++i) {
    const auto value = [&](auto x) {
      std::memcpy(&x, row.data() + i * sizeof x, sizeof x);
      return to_float(x);
    };
    out[i] = dtype == shm::kBfloat16   ? value(Bf16{})
             : dtype == shm::kFloat16 ? value(F16{})
                                      : value(float{});
  }
  return out;
}

nb::tuple read(const PagedKv& kv, std::int32_t layer, std::int32_t page, std::int32_t offset) {
  kv.check_place(layer, page, offset);
  const shm::Geometry& g = kv.geometry();
  std::vector<std::byte> k(g.kv_heads * g.head_dim * shm::dtype_bytes(g.dtype));
  std::vector<std::byte> v(k.size());
  kv.pages().read({static_cast<std::uint32_t>(layer), static_cast<std::uint32_t>(page),
                   static_cast<std::uint32_t>(offset), k.data(), v.data()});
  return nb::make_tuple(to_numpy(widen(k, g.dtype)), to_numpy(widen(v, g.dtype)));
}

}  // namespace

void bind_kv(nb::module_& m) {
  using namespace nb::literals;
  m.def("kernel_name", &kernel_name);
  m.def("kernel_names", &kernel_names);
  m.def("use_kernel", &use_kernel, "name"_a);
  nb::class_<ThreadPool>(m, "Threads")
      .def(
          "__init__",
          [](ThreadPool* self, unsigned count, std::int64_t spin_us) {
            new (self) ThreadPool(count, {}, spin_us);
          },
          "count"_a, "spin_us"_a = 0)
      .def_prop_ro("count", &ThreadPool::threads);
  nb::class_<PagedKv>(m, "PagedKv")
      .def(
          "__init__",
          [](PagedKv* self, std::uint32_t layers, std::uint32_t kv_heads, std::uint32_t head_dim,
             std::uint32_t page_tokens, std::uint32_t pages, const std::string& dtype,
             std::variant<unsigned, std::shared_ptr<ThreadPool>> threads,
             const std::string& kv_dtype) {
            if (const unsigned* count = std::get_if<unsigned>(&threads))
              threads = std::make_shared<ThreadPool>(*count);
            new (self) PagedKv(layers, kv_heads, head_dim, page_tokens, pages, dtype_code(dtype),
                               dtype_code(kv_dtype.empty() ? dtype : kv_dtype),
                               std::get<std::shared_ptr<ThreadPool>>(threads));
          },
          "layers"_a, "kv_heads"_a, "head_dim"_a, "page_tokens"_a, "pages"_a,
          "dtype"_a = "float32", "threads"_a = 1u, "kv_dtype"_a = "")
      .def("append", &append_rows, "layer"_a, "k"_a, "v"_a, "pages"_a, "offsets"_a)
      .def("attend", &attend_rows, "layer"_a, "q"_a, "out"_a, "tables"_a, "first_row"_a, "n_rows"_a,
           "first_position"_a, "window"_a = 0, "softcap"_a = 0.0f,
           "sinks"_a = std::vector<float>{})
      .def("export_tokens", &export_tokens, "link"_a, "layers"_a, "pages"_a, "offsets"_a,
           "slots"_a, "indices"_a)
      .def("import_tokens", &import_tokens, "link"_a, "layers"_a, "pages"_a, "offsets"_a,
           "slots"_a, "indices"_a)
      .def("read", &read, "layer"_a, "page"_a, "offset"_a);
}

}  // namespace omniserve
