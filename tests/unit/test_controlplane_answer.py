"""Stop strings: no text has one, none is missed, and nothing is held back without need."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from omniserve.controlplane.answer import AnswerText
from omniserve.controlplane.detokenizer import Detokenizer

TABLE = [b"a", b"b", b"ab", b"ba", b"aab", b" a", b"", "é".encode()[:1], "é".encode()[1:], b"."]
"""Tokens that overlap in many ways, one without text, and two halves of a character."""
TOKENS = st.lists(st.integers(0, len(TABLE) - 1), max_size=30)
STOPS = st.lists(st.text("ab é", min_size=1, max_size=5), min_size=1, max_size=3)


def answer(stop: list[str]) -> AnswerText:
    return AnswerText(Detokenizer(TABLE), stop)


def whole(tokens: list[int], stop: list[str]) -> tuple[list[int], str, bool]:
    """The same by brute force: tokens, text, and whether a stop string ended it."""
    for count in range(1, len(tokens) + 1):
        stream = Detokenizer(TABLE)
        text = stream.push(tokens[:count]).text
        found = [text.find(s) for s in stop if s in text]
        if found:
            return tokens[:count], text[: min(found)], True
    stream = Detokenizer(TABLE)
    return tokens, stream.push(tokens).text + stream.flush().text, False


@given(tokens=TOKENS, stop=STOPS, data=st.data())
def test_an_answer_ends_before_its_first_stop_string_however_its_tokens_come(
    tokens: list[int], stop: list[str], data: st.DataObject
) -> None:
    expected_tokens, expected_text, stopped = whole(tokens, stop)
    found = answer(stop)
    pieces = []
    rest = tokens
    while rest and not found.stopped:
        count = data.draw(st.integers(1, len(rest)))
        pieces.append(found.push(rest[:count]))
        rest = rest[count:]
    pieces.append(found.flush())
    assert "".join(piece.text for piece in pieces) == expected_text
    assert [i for piece in pieces for i in piece.token_ids] == expected_tokens
    assert found.stopped == stopped
    assert not any(s in expected_text for s in stop)


@given(tokens=TOKENS, stop=STOPS)
def test_a_stream_can_resume_behind_any_piece(tokens: list[int], stop: list[str]) -> None:
    first = answer(stop)
    text, taken = "", 0
    for token in tokens:
        piece = first.push([token])
        text += piece.text
        taken += len(piece.token_ids)
        if first.stopped:
            break
        second = answer(stop)
        behind = second.push(tokens[taken:])
        rest = behind.text + second.flush().text
        assert text + rest == whole(tokens, stop)[1]


@given(tokens=TOKENS, stop=STOPS)
def test_only_what_may_begin_a_stop_string_is_held_back(tokens: list[int], stop: list[str]) -> None:
    found = answer(stop)
    sent = found.push(tokens)
    if found.stopped:
        return
    text = Detokenizer(TABLE).push(tokens).text
    held = text[len(sent.text) :]
    # The first token held back holds some character from which on a stop string may begin.
    first = TABLE[tokens[len(sent.token_ids)]] if held else b""
    starts = range(len(held)) if b"\xa9" in first or b"\xc3" in first else range(len(first))
    assert not held or any(s.startswith(held[i:]) for i in starts for s in stop)


def test_without_stop_strings_text_goes_out_as_it_comes() -> None:
    plain = answer([])
    assert plain.push([0, 1, 7]).text == "ab"
    assert plain.push([8]).text == "é"
    assert plain.flush().token_ids == []
    assert not plain.stopped


def test_an_unfinished_character_at_the_end_may_complete_a_stop_string() -> None:
    found = answer(["\ufffd"])
    assert found.push([0, 7]).text == "a"
    assert found.flush().text == ""
    assert found.stopped
