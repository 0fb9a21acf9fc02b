"""When requests are sent."""

from __future__ import annotations

import random
from collections.abc import Iterator


def arrival_times_s(
    rate_per_s: float, burstiness: float, duration_s: float, seed: int
) -> Iterator[float]:
    """Yields times in [0, duration_s): gaps are gamma with mean 1 / rate and shape `burstiness`.

    Shape 1 is a Poisson process; less is burstier, more is more regular.
    """
    if rate_per_s <= 0:
        return
    draw = random.Random(seed)
    now_s = 0.0
    while True:
        now_s += draw.gammavariate(burstiness, 1 / (rate_per_s * burstiness))
        if now_s >= duration_s:
            return
        yield now_s
