#include <nanobind/stl/optional.h>

#include "bindings.h"
#include "segment.h"
#include "worker_link.h"

namespace omniserve {
namespace {

// A file that holds one Doorbell: what wakes a worker's engine.
class Bell {
 public:
  Bell(const std::string& path, bool create) {
    if (create) create_file(path, sizeof(shm::Doorbell));
    mapping_ = Mapping(path);
    if (mapping_.size() < sizeof(shm::Doorbell)) throw std::runtime_error(path + ": not a bell");
  }
  shm::Doorbell& bell() const { return *reinterpret_cast<shm::Doorbell*>(mapping_.data()); }

 private:
  Mapping mapping_;
};

nb::object slab(nb::handle_t<WorkerLink> self) {
  const SegmentView& segment = nb::cast<WorkerLink&>(self).segment();
  const shm::Geometry& g = segment.geometry();
  const std::size_t shape[2] = {g.slots, shm::slot_elems(g)};
  std::byte* data = segment.slab_row(0);
  if (shm::dtype_bytes(g.dtype) == 2)
    return nb::cast(nb::ndarray<nb::numpy, std::uint16_t, nb::ndim<2>>(data, 2, shape, self));
  return nb::cast(nb::ndarray<nb::numpy, float, nb::ndim<2>>(data, 2, shape, self));
}

// Read-only: the server writes it.
nb::object written_len(nb::handle_t<WorkerLink> self) {
  const SegmentView& segment = nb::cast<WorkerLink&>(self).segment();
  const shm::Geometry& g = segment.geometry();
  const std::size_t shape[2] = {g.max_sequences, g.layers};
  return nb::cast(nb::ndarray<nb::numpy, const std::uint32_t, nb::ndim<2>>(
      segment.written_len(0), 2, shape, self));
}

void submit(WorkerLink& link, std::uint32_t kind, const Int32s& layers, const Int32s& sequences,
            const Int32s& positions, const Int32s& slots, const std::optional<Int32s>& counts) {
  require_same_length({slots.size(), layers.size(), sequences.size(), positions.size(),
                       counts ? counts->size() : slots.size()});
  nb::gil_scoped_release release;
  link.submit(kind, layers.data(), sequences.data(), positions.data(),
              counts ? counts->data() : nullptr, slots.data(), slots.size());
}

nb::tuple poll(WorkerLink& link) {
  std::vector<std::int32_t> slots;
  std::vector<std::uint8_t> statuses;
  link.poll(slots, statuses);
  return nb::make_tuple(to_numpy(std::move(slots)), to_numpy(std::move(statuses)));
}

RowParts parts(const WorkerLink& link) { return RowParts(link.segment().geometry()); }

}  // namespace

void bind_link(nb::module_& m) {
  using namespace nb::literals;
  nb::class_<WorkerLink>(m, "WorkerLink")
      .def(nb::init<const std::string&>(), "segment_path"_a)
      .def_prop_ro("slab", &slab)
      .def_prop_ro("written_len", &written_len)
      .def_prop_ro("q_offset", [](const WorkerLink& l) { return parts(l).q; })
      .def_prop_ro("k_offset", [](const WorkerLink& l) { return parts(l).k; })
      .def_prop_ro("v_offset", [](const WorkerLink& l) { return parts(l).v; })
      .def_prop_ro("out_offset", [](const WorkerLink& l) { return parts(l).out; })
      .def_prop_ro("transfer_tokens",
                   [](const WorkerLink& l) { return shm::transfer_tokens(l.segment().geometry()); })
      .def_prop_ro("slot_elems",
                   [](const WorkerLink& l) { return shm::slot_elems(l.segment().geometry()); })
      .def_prop_ro("geometry", [](const WorkerLink& l) { return l.segment().geometry(); })
      .def_prop_ro("segment_id", &WorkerLink::segment_id)
      .def_prop_ro("epoch", &WorkerLink::epoch)
      .def_prop_ro("outstanding", &WorkerLink::outstanding)
      .def_prop_ro("current", &WorkerLink::current)
      .def_prop_ro("ring_waits", &WorkerLink::ring_waits)
      .def("submit", &submit, "kind"_a, "layers"_a, "sequences"_a, "positions"_a, "slots"_a,
           "counts"_a = nb::none())
      .def("poll", &poll)
      .def("check_integrity", &WorkerLink::check_integrity);

  nb::class_<Bell>(m, "Bell")
      .def(nb::init<const std::string&, bool>(), "path"_a, "create"_a)
      .def("ring", [](const Bell& b) { ring_bell(b.bell()); })
      .def("value",
           [](const Bell& b) { return b.bell().value.load(std::memory_order_acquire); })
      .def(
          "wait",
          [](const Bell& b, std::uint32_t seen, std::int64_t timeout_us) {
            nb::gil_scoped_release release;
            return wait_bell(b.bell(), seen, timeout_us);
          },
          "seen"_a, "timeout_us"_a);
}

}  // namespace omniserve
