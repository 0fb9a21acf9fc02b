import asyncio
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.stack import MODEL_PATH
from transformers import AutoTokenizer

from omniserve.controlplane import tokenizer
from omniserve.controlplane.tokenizer import Tokenizer
from omniserve.errors import ModelFileError

TEXTS = [
    "Hello  world é 😀 <|im_end|> 123",
    "def f(x):\n\treturn x + 1\n\n",
    "日本語のテキスト と español, naïve 👩‍👩‍👧",
    " leading and trailing ",
    "1234567890 0.5e-3\r\n",
    "word " * 3000,
]
CHATS = [
    [{"role": "user", "content": "hi"}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Who are you?"},
        {"role": "assistant", "content": "A model."},
        {"role": "user", "content": "Why? " * 2000},
    ],
]


@pytest.fixture(scope="module")
def ours() -> Tokenizer:
    return tokenizer.load(MODEL_PATH)


@pytest.fixture(scope="module")
def reference() -> Any:
    return AutoTokenizer.from_pretrained(str(MODEL_PATH.parent), gguf_file=MODEL_PATH.name)


@pytest.mark.parametrize("text", TEXTS)
def test_text_gets_the_tokens_that_transformers_gives_it(
    ours: Tokenizer, reference: Any, text: str
) -> None:
    assert asyncio.run(ours.encode(text)) == reference(text).input_ids


@pytest.mark.parametrize("messages", CHATS)
def test_a_chat_gets_the_tokens_that_transformers_gives_it(
    ours: Tokenizer, reference: Any, messages: list[dict[str, str]]
) -> None:
    expected = reference.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert asyncio.run(ours.encode_chat(messages)) == expected


@settings(deadline=None)
@given(st.lists(st.integers(0, 49_151), max_size=60), st.data())
def test_streamed_text_joins_to_what_transformers_decodes(
    ours: Tokenizer, reference: Any, token_ids: list[int], data: st.DataObject
) -> None:
    expected = reference.decode(token_ids, skip_special_tokens=True)
    assert ours.decode(token_ids) == expected
    stream = ours.detokenizer()
    pieces = []
    rest = token_ids
    while rest:
        count = data.draw(st.integers(1, len(rest)))
        pieces.append(stream.push(rest[:count]))
        rest = rest[count:]
    pieces.append(stream.flush())
    assert "".join(piece.text for piece in pieces) == expected
    assert [i for piece in pieces for i in piece.token_ids] == token_ids


def test_a_character_of_several_tokens_is_never_cut(ours: Tokenizer) -> None:
    text = "a😀b日本👩‍👩‍👧"
    token_ids = asyncio.run(ours.encode(text))
    assert len(token_ids) > len(text)
    stream = ours.detokenizer()
    pieces = [stream.push([token_id]) for token_id in token_ids]
    assert "\ufffd" not in "".join(piece.text for piece in pieces)
    assert "".join(piece.text for piece in pieces) == text
    # Whoever resumes behind a piece's tokens needs nothing of what came before.
    for piece in pieces:
        assert ours.decode(piece.token_ids) == piece.text


def test_text_over_the_byte_bound_cannot_fit_the_context(ours: Tokenizer) -> None:
    assert ours.text_bytes_max >= ours.context_tokens
    longest = max(ours.token_bytes, key=len)
    assert len(longest) * ours.context_tokens == ours.text_bytes_max


def test_the_tokenizer_needs_no_torch() -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from pathlib import Path\n"
        "from omniserve.controlplane import server, tokenizer\n"
        f"print(tokenizer.load(Path({str(MODEL_PATH)!r})).vocabulary_tokens)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "49152"


@pytest.mark.parametrize("size", [0, 3, 1000, 200_000, 2_000_000, 50_000_000])
def test_a_truncated_file_is_a_typed_error(tmp_path: Path, size: int) -> None:
    path = tmp_path / "cut.gguf"
    with MODEL_PATH.open("rb") as whole:
        path.write_bytes(whole.read(size))
    with pytest.raises(ModelFileError, match=r"cut\.gguf"):
        tokenizer.load(path)


def test_a_missing_or_foreign_file_is_a_typed_error(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="No such file"):
        tokenizer.load(tmp_path / "none.gguf")
    (tmp_path / "text.gguf").write_text("not a model\n" * 1000)
    with pytest.raises(ModelFileError, match="not a whole GGUF file"):
        tokenizer.load(tmp_path / "text.gguf")
