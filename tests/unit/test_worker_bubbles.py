"""Which time counts as a device's bubbles."""

from __future__ import annotations

from omniserve.gpuworker.device.bubbles import Bubbles


class Device:
    """Whose stages take 10 ns, with 7 ns of attention behind them."""

    def __init__(self) -> None:
        self.now_ns = 0
        self.bubbles = Bubbles(lambda: self.now_ns, lambda since, until: until - since)

    def run(self, *stages: int, in_pass: bool = True, idle_ns: int = 0) -> None:
        for stage in stages:
            self.now_ns += idle_ns
            self.bubbles.begin(stage, in_pass)
            self.now_ns += 10
            self.bubbles.end()
            self.now_ns += 7
            self.bubbles.end()


def test_time_between_the_stages_of_a_pass_counts() -> None:
    device = Device()
    device.run(0, 1, 2, idle_ns=3)
    assert device.bubbles.total_ns == 0  # nothing is known before it settles
    device.bubbles.settle()
    assert device.bubbles.total_ns == 6
    device.bubbles.settle()
    assert device.bubbles.total_ns == 6


def test_time_between_passes_does_not_count() -> None:
    device = Device()
    device.run(0, 1)
    device.run(0, 1, idle_ns=100)
    device.bubbles.settle()
    assert device.bubbles.total_ns == 100  # the one before the second stage 1


def test_stages_without_ls_rows_do_not_count() -> None:
    device = Device()
    device.run(0, 1, 2, in_pass=False, idle_ns=5)
    device.run(3, idle_ns=5)
    device.run(4, in_pass=False, idle_ns=5)
    device.run(5, idle_ns=5)
    device.bubbles.settle()
    assert device.bubbles.total_ns == 0
