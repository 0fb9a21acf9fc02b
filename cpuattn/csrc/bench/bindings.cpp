// What benchmarks time in native code. Not part of the library: nothing else imports it.
#include <nanobind/nanobind.h>

namespace omniserve {
void bind_transport(nanobind::module_& m);
}  // namespace omniserve

NB_MODULE(_bench, m) { omniserve::bind_transport(m); }
