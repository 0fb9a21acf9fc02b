#include "bindings.h"

#include "segment.h"

namespace omniserve {
namespace {

nb::dict offsets_of_geometry() {
  nb::dict d;
#define PUT(field) d[#field] = offsetof(shm::Geometry, field)
  PUT(layers); PUT(heads); PUT(kv_heads); PUT(head_dim); PUT(dtype); PUT(kv_dtype); PUT(page_tokens);
  PUT(max_sequences); PUT(max_sequence_tokens); PUT(slots); PUT(pages);
#undef PUT
  d["sizeof"] = sizeof(shm::Geometry);
  return d;
}

nb::dict offsets_of_regions() {
  nb::dict d;
#define PUT(field) d[#field] = offsetof(shm::Regions, field)
  PUT(sequence_state); PUT(written_len); PUT(page_table); PUT(layer_options);
  PUT(sinks); PUT(request_ring); PUT(low_ring);
  PUT(response_ring); PUT(slot_headers); PUT(slab); PUT(kv); PUT(end);
#undef PUT
  d["sizeof"] = sizeof(shm::Regions);
  return d;
}

nb::dict offsets_of_header() {
  nb::dict d;
#define PUT(field) d[#field] = offsetof(shm::Header, field)
  PUT(magic); PUT(layout_version); PUT(ready); PUT(epoch); PUT(segment_id); PUT(arena_bytes);
  PUT(geometry); PUT(ring_capacity); PUT(max_pages_per_sequence); PUT(padding); PUT(regions);
  PUT(worker_id); PUT(bell_path); PUT(doorbell);
#undef PUT
  d["sizeof"] = sizeof(shm::Header);
  return d;
}

nb::dict offsets_of_small_structs() {
  nb::dict doorbell, ring, slot, options, all;
#define PUT(d, type, field) d[#field] = offsetof(shm::type, field)
  PUT(doorbell, Doorbell, value); PUT(doorbell, Doorbell, sleeping);
  PUT(doorbell, Doorbell, reserved);
  PUT(ring, RingHeader, head); PUT(ring, RingHeader, head_reserved);
  PUT(ring, RingHeader, tail); PUT(ring, RingHeader, tail_reserved);
  PUT(slot, SlotHeader, kind); PUT(slot, SlotHeader, layer); PUT(slot, SlotHeader, sequence);
  PUT(slot, SlotHeader, position); PUT(slot, SlotHeader, count);
  PUT(slot, SlotHeader, request_generation);
  PUT(slot, SlotHeader, status); PUT(slot, SlotHeader, done_generation);
  PUT(slot, SlotHeader, reserved);
  PUT(options, LayerOptions, window); PUT(options, LayerOptions, softcap);
#undef PUT
  options["sizeof"] = sizeof(shm::LayerOptions);
  doorbell["sizeof"] = sizeof(shm::Doorbell);
  ring["sizeof"] = sizeof(shm::RingHeader);
  slot["sizeof"] = sizeof(shm::SlotHeader);
  all["LayerOptions"] = options;
  all["Doorbell"] = doorbell;
  all["RingHeader"] = ring;
  all["SlotHeader"] = slot;
  return all;
}

nb::dict struct_offsets() {
  nb::dict all = offsets_of_small_structs();
  all["Geometry"] = offsets_of_geometry();
  all["Regions"] = offsets_of_regions();
  all["Header"] = offsets_of_header();
  return all;
}

nb::dict region_offsets(const shm::Geometry& g) {
  const shm::Regions r = shm::regions_of(g);
  nb::dict d;
  d["sequence_state"] = r.sequence_state;
  d["written_len"] = r.written_len;
  d["page_table"] = r.page_table;
  d["layer_options"] = r.layer_options;
  d["sinks"] = r.sinks;
  d["request_ring"] = r.request_ring;
  d["low_ring"] = r.low_ring;
  d["response_ring"] = r.response_ring;
  d["slot_headers"] = r.slot_headers;
  d["slab"] = r.slab;
  d["kv"] = r.kv;
  d["end"] = r.end;
  return d;
}

}  // namespace

void bind_layout(nb::module_& m) {
  using namespace nb::literals;
  nb::class_<shm::Geometry>(m, "Geometry")
      .def(
          "__init__",
          [](shm::Geometry* self, std::uint32_t layers, std::uint32_t heads,
             std::uint32_t kv_heads, std::uint32_t head_dim, const std::string& dtype,
             const std::string& kv_dtype, std::uint32_t page_tokens, std::uint32_t max_sequences,
             std::uint32_t max_sequence_tokens, std::uint32_t slots, std::uint32_t pages) {
            new (self) shm::Geometry{
                layers,      heads,         kv_heads,
                head_dim,    dtype_code(dtype), dtype_code(kv_dtype),
                page_tokens, max_sequences, max_sequence_tokens,
                slots,       pages};
          },
          nb::kw_only(), "layers"_a, "heads"_a, "kv_heads"_a, "head_dim"_a, "dtype"_a,
          "kv_dtype"_a, "page_tokens"_a, "max_sequences"_a, "max_sequence_tokens"_a, "slots"_a, "pages"_a)
      .def_ro("layers", &shm::Geometry::layers)
      .def_ro("heads", &shm::Geometry::heads)
      .def_ro("kv_heads", &shm::Geometry::kv_heads)
      .def_ro("head_dim", &shm::Geometry::head_dim)
      .def_prop_ro("dtype", [](const shm::Geometry& g) { return dtype_name(g.dtype); })
      .def_prop_ro("kv_dtype", [](const shm::Geometry& g) { return dtype_name(g.kv_dtype); })
      .def_ro("page_tokens", &shm::Geometry::page_tokens)
      .def_ro("max_sequences", &shm::Geometry::max_sequences)
      .def_ro("max_sequence_tokens", &shm::Geometry::max_sequence_tokens)
      .def_ro("slots", &shm::Geometry::slots)
      .def_ro("pages", &shm::Geometry::pages);
  m.def("struct_offsets", &struct_offsets);
  m.def("region_offsets", &region_offsets, "geometry"_a);
  m.def("ring_capacity", &shm::ring_capacity, "slots"_a);
  m.attr("MAGIC") = shm::kMagic;
  m.attr("LAYOUT_VERSION") = shm::kLayoutVersion;
  m.attr("KIND_ATTEND") = static_cast<int>(shm::kAttend);
  m.attr("KIND_CHECKPOINT") = static_cast<int>(shm::kCheckpoint);
  m.attr("KIND_RESTORE") = static_cast<int>(shm::kRestore);
  m.attr("KIND_FREE") = static_cast<int>(shm::kFree);
  m.attr("STATUS_OK") = static_cast<int>(shm::kOk);
  m.attr("STATUS_BAD_KIND") = static_cast<int>(shm::kBadKind);
  m.attr("STATUS_BAD_LAYER") = static_cast<int>(shm::kBadLayer);
  m.attr("STATUS_BAD_SEQUENCE") = static_cast<int>(shm::kBadSequence);
  m.attr("STATUS_BAD_POSITION") = static_cast<int>(shm::kBadPosition);
  m.attr("STATUS_NO_PAGE") = static_cast<int>(shm::kNoPage);
  m.attr("STATUS_FREED") = static_cast<int>(shm::kFreed);
  m.attr("STATUS_BAD_COUNT") = static_cast<int>(shm::kBadCount);
}

}  // namespace omniserve

NB_MODULE(_core, m) {
  omniserve::bind_layout(m);
  omniserve::bind_link(m);  // before kv, whose signatures name WorkerLink
  omniserve::bind_kv(m);
  omniserve::bind_dense(m);  // after kv, which has Threads
  omniserve::bind_server(m);
}
