#include <nanobind/stl/string.h>

#include "dispatch.h"
#include "probes.h"

NB_MODULE(_bench, m) {
  omniserve::bind_attention(m);
  omniserve::bind_bandwidth(m);
  omniserve::bind_transfer(m);
  omniserve::bind_dense_bench(m);
  omniserve::bind_transport(m);
  // This module has kernels of its own, apart from those of _core.
  m.def("kernel_name", &omniserve::kernel_name);
  m.def("use_kernel", &omniserve::use_kernel, nanobind::arg("name"));
}
