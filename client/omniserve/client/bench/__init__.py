"""Load generator: latency-sensitive chat beside a best-effort backlog, and its report."""

from omniserve.client.bench.run import run_bench
from omniserve.client.bench.settings import BenchSettings

__all__ = ["BenchSettings", "run_bench"]
