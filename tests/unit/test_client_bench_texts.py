"""The real text that the load generator sends."""

from __future__ import annotations

from omniserve.client.bench.texts import dialogues, problems


def test_every_dialogue_alternates_and_ends_with_the_user() -> None:
    found = dialogues()
    assert len(found) > 1000
    for messages in found:
        assert [m.role for m in messages[::2]] == ["user"] * len(messages[::2])
        assert [m.role for m in messages[1::2]] == ["assistant"] * len(messages[1::2])
        assert len(messages) % 2 == 1
        assert all(m.content for m in messages)


def test_problems_are_the_164_of_humaneval() -> None:
    found = problems()
    assert len(found) == 164
    assert all("def " in prompt for prompt in found)
