"""Which sampling parameters can be served: one check for the control plane and the worker."""

from __future__ import annotations

from omniserve.errors import InvalidArgumentError
from omniserve.v1 import types_pb2

STOP_STRINGS_MAX = 16
STOP_CHARS_MAX = 128
LOGPROBS_MAX = 20

_RANGES = {
    "temperature": (0.0, 100.0),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (0.01, 100.0),
    "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (-2.0, 2.0),
}
"""Least and greatest value of each number; 0 is always allowed."""


def check_sampling(sampling: types_pb2.SamplingParams, prefix: str = "") -> None:
    """Raises InvalidArgumentError naming the field; `prefix` is where `sampling` stands."""
    for name, (least, greatest) in _RANGES.items():
        value = getattr(sampling, name)
        if value != 0 and not least <= value <= greatest:  # also true for NaN
            raise InvalidArgumentError(
                f"must be 0 or in [{least:g}, {greatest:g}]", field=f"{prefix}sampling.{name}"
            )
    if sampling.logprobs > LOGPROBS_MAX:
        raise InvalidArgumentError(
            f"must be at most {LOGPROBS_MAX}", field=f"{prefix}sampling.logprobs"
        )
    if len(sampling.stop) > STOP_STRINGS_MAX:
        raise InvalidArgumentError(
            f"must be at most {STOP_STRINGS_MAX} strings", field=f"{prefix}sampling.stop"
        )
    for index, text in enumerate(sampling.stop):
        if not 1 <= len(text) <= STOP_CHARS_MAX:
            raise InvalidArgumentError(
                f"must be 1 to {STOP_CHARS_MAX} characters",
                field=f"{prefix}sampling.stop[{index}]",
            )
