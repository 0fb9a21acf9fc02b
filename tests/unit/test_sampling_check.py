"""Which sampling parameters are refused, and by which field's name."""

from __future__ import annotations

import math
from typing import Any

import pytest

from omniserve.errors import InvalidArgumentError
from omniserve.sampling import LOGPROBS_MAX, STOP_CHARS_MAX, STOP_STRINGS_MAX, check_sampling
from omniserve.v1.types_pb2 import SamplingParams

NUMBERS = [
    "temperature",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
]


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", [-100.5, 100.5, math.nan, math.inf, -math.inf])
def test_a_number_out_of_its_range_is_refused_by_name(name: str, value: float) -> None:
    with pytest.raises(InvalidArgumentError) as refusal:
        check_sampling(SamplingParams(**{name: value}), "items[3].")
    assert refusal.value.field == f"items[3].sampling.{name}"


BAD: list[tuple[dict[str, Any], str]] = [
    ({"logprobs": LOGPROBS_MAX + 1}, "logprobs"),
    ({"stop": ["a"] * (STOP_STRINGS_MAX + 1)}, "stop"),
    ({"stop": ["a", ""]}, "stop[1]"),
    ({"stop": ["a" * (STOP_CHARS_MAX + 1)]}, "stop[0]"),
    ({"repetition_penalty": 1e-9}, "repetition_penalty"),
]


@pytest.mark.parametrize(("fields", "named"), BAD)
def test_what_cannot_be_served_is_refused_by_name(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidArgumentError) as refusal:
        check_sampling(SamplingParams(**fields))
    assert refusal.value.field == f"sampling.{named}"


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"temperature": 100.0, "top_k": 2**32 - 1, "top_p": 1.0, "min_p": 1.0},
        {"repetition_penalty": 0.01, "presence_penalty": -2.0, "frequency_penalty": 2.0},
        {"logprobs": LOGPROBS_MAX, "stop": ["a" * STOP_CHARS_MAX] * STOP_STRINGS_MAX},
    ],
)
def test_the_ends_of_the_ranges_are_allowed(fields: dict[str, Any]) -> None:
    check_sampling(SamplingParams(**fields))
