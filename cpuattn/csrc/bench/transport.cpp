#include <nanobind/nanobind.h>
namespace omniserve {
void bind_transport(nanobind::module_&) {}
}  // namespace omniserve
