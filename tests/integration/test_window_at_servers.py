"""A model with sliding windows: the same tokens from the device, from the attention servers, and
from `transformers`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.random_models import KINDS, VOCABULARY, WINDOW_TOKENS, make
from support.worker_stack import WorkerStack

MAX_TOKENS = 40
DRAW = torch.Generator().manual_seed(7)
PROMPTS = [
    torch.randint(3, VOCABULARY, (length,), generator=DRAW).tolist()
    for length in (5, WINDOW_TOKENS - 1, 3 * WINDOW_TOKENS, 130)
]
"""Windows that fill while decoding, and prompts longer than the window."""


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[list[int]]:
    """Greedy continuations. The model is made again: from the same seed, the same weights."""
    assert folder.is_dir()
    model = make(next(kind for kind in KINDS if kind.name == "mistral-window"))
    answers = []
    for prompt in PROMPTS:
        tokens = list(prompt)
        for _ in range(MAX_TOKENS):
            with torch.inference_mode():
                tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
        answers.append(tokens[len(prompt) :])
    return answers


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mistral")
    make(next(kind for kind in KINDS if kind.name == "mistral-window")).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def stack(folder: Path) -> Iterator[WorkerStack]:
    flags = {"model-path": folder, "be-placement": "host"}
    with WorkerStack(servers=1, worker_flags=flags) as stack:
        yield stack


@pytest.mark.parametrize("best_effort", [False, True])
def test_tokens_are_those_of_transformers_on_either_path(
    stack: WorkerStack, expected: list[list[int]], best_effort: bool
) -> None:
    streams = stack.start_all(PROMPTS, MAX_TOKENS, best_effort=best_effort, ignore_eos=True)
    assert [stream.finish() for stream in streams] == expected
    if best_effort:
        by_path = stack.telemetry().be_tokens_by_path
        assert by_path.boarded + by_path.be_only > 0
