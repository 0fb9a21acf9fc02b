"""report.png: latency distributions with their objectives, best-effort throughput over time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omniserve.client.bench import metrics
from omniserve.client.bench.metrics import RequestRecord
from omniserve.client.bench.samples import BE_PATHS, Sample, be_rates
from omniserve.client.bench.settings import BenchSettings

LABELS = {"device_resident": "device-resident", "boarded": "boarded with LS", "be_only": "BE-only"}


def write_plot(
    path: Path,
    settings: BenchSettings,
    records: Sequence[RequestRecord],
    samples: Sequence[Sample],
) -> None:
    """Draws the three panels into a PNG."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (ttft, tpot, rate) = plt.subplots(1, 3, figsize=(15, 4.2), layout="constrained")
    _distribution(ttft, "TTFT", metrics.ttfts_ms(records), settings.slo_ttft_ms)
    _distribution(tpot, "TPOT", metrics.tpots_ms(records), settings.slo_tpot_ms)
    rates = be_rates(samples)
    rate.stackplot(
        [at_s for at_s, _ in rates],
        [[by_path[p] for _, by_path in rates] for p in BE_PATHS],
        labels=[LABELS[p] for p in BE_PATHS],
    )
    rate.set(title="Best-effort output", xlabel="time, s", ylabel="tokens/s")
    rate.legend(loc="upper left")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _distribution(axes: Any, name: str, values: Sequence[float], slo_ms: float) -> None:
    """Draws the share of requests within each latency, and the objective as a line."""
    ordered = sorted(values)
    shares = [(i + 1) / len(ordered) for i in range(len(ordered))]
    axes.step([0.0, *ordered], [0.0, *shares], where="post", label="requests")
    axes.axvline(slo_ms, color="tab:red", linestyle="--", label=f"objective {slo_ms:g} ms")
    axes.set(title=name, xlabel=f"{name}, ms", ylabel="share of requests", ylim=(0, 1.02))
    axes.set_xlim(left=0)
    axes.legend(loc="lower right")
