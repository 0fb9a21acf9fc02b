#include <nanobind/stl/tuple.h>

#include "bindings.h"
#include "server_loop.h"

namespace omniserve {
namespace {

using Layer = std::tuple<std::uint32_t, float, std::vector<float>>;  // window, softcap, sinks

void format(ServerLoop& loop, const std::string& worker_id, std::uint64_t epoch,
            std::uint64_t segment_id, const shm::Geometry& geometry, const std::string& bell_path,
            const std::vector<Layer>& layers) {
  std::vector<LayerRules> rules;
  for (const auto& [window, softcap, sinks] : layers) rules.push_back({{window, softcap}, sinks});
  nb::gil_scoped_release release;
  loop.format(worker_id, epoch, segment_id, geometry, bell_path, rules);
}

}  // namespace

void bind_server(nb::module_& m) {
  using namespace nb::literals;
  using Release = nb::call_guard<nb::gil_scoped_release>;
  nb::class_<ServerLoop>(m, "ServerLoop")
      .def(
          "__init__",
          [](ServerLoop* self, const std::string& path, unsigned threads, std::int64_t spin_us,
             bool background, const std::vector<int>& cpus, std::int64_t fault_delay_us,
             std::uint64_t fault_seed) {
            new (self) ServerLoop(
                path, LoopOptions{threads, spin_us, background, cpus, fault_delay_us, fault_seed});
          },
          Release(), "path"_a, "threads"_a = 1, "spin_us"_a = 0, "background"_a = false,
          "cpus"_a = std::vector<int>{}, "fault_delay_us"_a = 0, "fault_seed"_a = 0)
      .def_prop_ro("not_adopted", &ServerLoop::not_adopted)
      .def_prop_ro("not_locked", &ServerLoop::not_locked)
      .def_prop_ro("not_in_background", &ServerLoop::not_in_background)
      .def_prop_ro("attached", &ServerLoop::attached)
      .def_prop_ro("worker_id", [](const ServerLoop& l) { return l.owner().worker_id; })
      .def_prop_ro("epoch", [](const ServerLoop& l) { return l.owner().epoch; })
      .def_prop_ro("segment_id", [](const ServerLoop& l) { return l.owner().segment_id; })
      .def_prop_ro("geometry", [](const ServerLoop& l) { return l.geometry(); })
      .def_prop_ro("progress", &ServerLoop::progress)
      .def("format", &format, "worker_id"_a, "epoch"_a, "segment_id"_a, "geometry"_a,
           "bell_path"_a, "layers"_a = std::vector<Layer>{})
      .def("rebell", &ServerLoop::rebell, Release(), "bell_path"_a)
      .def("drain", &ServerLoop::drain, Release(), "timeout_ms"_a)
      .def("stop", &ServerLoop::stop, Release())
      .def("pages_free", &ServerLoop::pages_free, Release())
      .def("stats", [](ServerLoop& l) {
        ExecutorStats stats;
        {
          nb::gil_scoped_release release;
          stats = l.stats();
        }
        return nb::make_tuple(stats.rows, stats.kv_bytes_read, stats.errors);
      });
}

}  // namespace omniserve
