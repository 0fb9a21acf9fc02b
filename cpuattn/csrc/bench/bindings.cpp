#include "probes.h"

NB_MODULE(_bench, m) {
  omniserve::bind_attention(m);
  omniserve::bind_bandwidth(m);
  omniserve::bind_dense_bench(m);
  omniserve::bind_transfer(m);
  omniserve::bind_transport(m);
}
