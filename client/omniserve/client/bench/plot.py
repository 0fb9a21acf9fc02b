"""report.png: latency distributions with their objectives, best-effort throughput over time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omniserve.client.bench import metrics
from omniserve.client.bench.metrics import RequestRecord
from omniserve.client.bench.samples import BE_PATHS, Sample, be_rates
from omniserve.client.bench.settings import BenchSettings

# Name and colour of each path.
PATHS = {
    "device_resident": ("device-resident", "#4c78a8"),
    "boarded": ("boarded with LS", "#f58518"),
    "be_only": ("BE-only", "#9ecae9"),
}
# Best-effort tokens come in bursts: each point is the mean over this many samples before it.
RATE_SAMPLES = 6


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

    figure, (ttft, tpot, rate) = plt.subplots(1, 3, figsize=(15, 4.6), layout="constrained")
    _distribution(ttft, "TTFT", metrics.ttfts_ms(records), len(records), settings.slo_ttft_ms)
    tpots = metrics.tpots_ms(records)
    _distribution(tpot, "TPOT", tpots, len(tpots), settings.slo_tpot_ms)
    _throughput(rate, samples)
    figure.suptitle(_headline(settings, records, samples))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _headline(
    settings: BenchSettings, records: Sequence[RequestRecord], samples: Sequence[Sample]
) -> str:
    share = metrics.attainment(records, settings.slo_ttft_ms, settings.slo_tpot_ms)
    chat = "no chat" if share is None else f"{share:.0%} of {len(records)} chat requests in time"
    workers = samples[-1].status.workers if samples else ()
    return f"{workers[0].model} on {workers[0].device}: {chat}" if workers else chat


def _distribution(axes: Any, name: str, values: Sequence[float], total: int, slo_ms: float) -> None:
    """Draws the share of `total` requests within each latency, and the objective as a line."""
    ordered = sorted(values)
    shares = [(i + 1) / total for i in range(len(ordered))]
    right = 1.25 * max([slo_ms, *ordered])
    # Drawn on to the edge: requests without a first token keep the line below 1.
    axes.step([0.0, *ordered, right], [0.0, *shares, (shares or [0.0])[-1]], where="post")
    axes.axvspan(0, slo_ms, color="tab:green", alpha=0.08)
    axes.axvline(slo_ms, color="tab:red", linestyle="--", label=f"objective {slo_ms:g} ms")
    axes.set(title=name, xlabel=f"{name}, ms", ylabel="share of chat requests")
    axes.set(xlim=(0, right), ylim=(0, 1.02))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")


def _throughput(axes: Any, samples: Sequence[Sample]) -> None:
    """Stacks best-effort tokens/s by path over the time of the run."""
    pairs = [(samples[max(0, i - RATE_SAMPLES)], samples[i]) for i in range(1, len(samples))]
    rates = [rate for pair in pairs for rate in be_rates(pair)]
    axes.stackplot(
        [at_s for at_s, _ in rates],
        [[by_path[p] for _, by_path in rates] for p in BE_PATHS],
        labels=[PATHS[p][0] for p in BE_PATHS],
        colors=[PATHS[p][1] for p in BE_PATHS],
    )
    axes.set(title="Best-effort output", xlabel="time, s", ylabel="tokens/s")
    axes.set_xlim(left=0, right=samples[-1].at_s if len(samples) > 1 else None)
    axes.grid(alpha=0.3)
    # Above the data's highest point, so that it hides nothing.
    axes.set_ylim(top=1.25 * axes.get_ylim()[1])
    axes.legend(loc="upper center", ncols=3, fontsize="small")
