import asyncio
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from support.stack import MODEL_PATH
from tokenizers import decoders, models, normalizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from omniserve.controlplane import tokenizer
from omniserve.controlplane.prompts import encode_prompt
from omniserve.controlplane.tokenizer import Tokenizer
from omniserve.errors import InvalidArgumentError, ModelFileError
from omniserve.v1 import inference_pb2, types_pb2

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


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_the_tokenizer_needs_no_torch(kind: str, folder: Path) -> None:
    path = MODEL_PATH if kind == "file" else folder
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from pathlib import Path\n"
        "from omniserve.controlplane import server, tokenizer\n"
        f"print(tokenizer.load(Path({str(path)!r})).vocabulary_tokens)"
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


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, reference: Any) -> Path:
    """The same tokenizer as a Hugging Face folder has it."""
    folder = tmp_path_factory.mktemp("folder")
    reference.save_pretrained(folder)
    fields = {"model_type": "llama", "vocab_size": 49_152, "eos_token_id": [0, 2]}
    fields["max_position_embeddings"] = 8192
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


def test_a_folder_yields_the_same_tokenizer_as_a_gguf_file(ours: Tokenizer, folder: Path) -> None:
    theirs = tokenizer.load(folder)
    assert theirs.token_bytes == ours.token_bytes
    assert theirs.context_tokens == ours.context_tokens
    assert theirs.stop_tokens == {0, 2}
    for text in TEXTS:
        assert asyncio.run(theirs.encode(text)) == asyncio.run(ours.encode(text))
    for messages in CHATS:
        assert asyncio.run(theirs.encode_chat(messages)) == asyncio.run(ours.encode_chat(messages))


def test_generation_config_knows_all_end_of_sequence_tokens(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    (copy / "generation_config.json").write_text('{"eos_token_id": 5}')
    assert tokenizer.load(copy).stop_tokens == {5}


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_folder_that_lacks_a_file_or_has_a_broken_one_is_a_typed_error(
    folder: Path, tmp_path: Path, name: str
) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    (copy / name).write_text("{")
    with pytest.raises(ModelFileError, match=re.escape(str(copy))):
        tokenizer.load(copy)
    (copy / name).unlink()
    with pytest.raises(ModelFileError, match=re.escape(name)):
        tokenizer.load(copy)


@pytest.mark.parametrize("missing", ["max_position_embeddings", "vocab_size", "eos_token_id"])
def test_a_missing_field_of_a_folder_is_named(folder: Path, tmp_path: Path, missing: str) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    fields = json.loads((copy / "config.json").read_text())
    del fields[missing]
    (copy / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ModelFileError, match=missing):
        tokenizer.load(copy)


SPECIALS = ["<unk>", "<s>", "</s>"]
MERGES = [("t", "h"), ("th", "e"), ("\u2581", "the"), ("a", "n"), ("\u2581", "an")]
PIECES = [
    *SPECIALS,
    *(f"<0x{byte:02X}>" for byte in range(256)),
    *"\u2581abcdefghijklmnopqrstuvwxyz.,",
    *(left + right for left, right in MERGES),
]
"""A vocabulary as Mistral's: spaces spelled U+2581, bytes where a character is not in it."""


def save_sentencepiece(folder: Path) -> None:
    vocabulary = {piece: index for index, piece in enumerate(PIECES)}
    model = tokenizers.Tokenizer(
        models.BPE(vocabulary, MERGES, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    model.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    model.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    model.add_special_tokens(SPECIALS)
    PreTrainedTokenizerFast(
        tokenizer_object=model, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    fields = {"max_position_embeddings": 1024, "vocab_size": len(PIECES) + 5, "eos_token_id": 2}
    (folder / "config.json").write_text(json.dumps(fields))


def test_a_vocabulary_of_sentencepiece_decodes_as_transformers_does(tmp_path: Path) -> None:
    save_sentencepiece(tmp_path)
    ours = tokenizer.load(tmp_path)
    reference = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    for text in ["the answer, an apple", "naïve 日本 😀 the", "a  b"]:
        token_ids = asyncio.run(ours.encode(text))
        assert token_ids == reference(text).input_ids
        assert ours.decode(token_ids) == " " + reference.decode(token_ids, skip_special_tokens=True)
        assert ours.decode(token_ids) == " " + text
    # A space at the start of an answer is part of it.
    assert ours.decode(asyncio.run(ours.encode("the"))) == " the"
    assert ours.decode([2]) == ""
    # A model may have more tokens than its tokenizer knows.
    assert ours.decode([len(PIECES) + 4]) == ""


def test_a_gguf_file_may_have_a_vocabulary_of_sentencepiece(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(1024)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(PIECES)
    writer.add_token_scores([-float(index) for index in range(len(PIECES))])
    kinds = gguf.TokenType
    types = [kinds.CONTROL] * len(SPECIALS) + [kinds.BYTE] * 256
    writer.add_token_types(types + [kinds.NORMAL] * (len(PIECES) - len(types)))
    writer.add_eos_token_id(2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    ours = tokenizer.load(path)
    token_ids = asyncio.run(ours.encode("the answer, naïve 😀 an"))
    assert PIECES.index("\u2581the") in token_ids
    assert ours.decode(token_ids) == " the answer, naïve 😀 an"
    assert ours.decode([2]) == ""
    assert ours.stop_tokens == {2}


@pytest.mark.parametrize("template", [None, "{{ raise_exception('roles must alternate') }}"])
def test_a_chat_that_the_model_s_template_does_not_take_is_refused(template: str | None) -> None:
    model = tokenizer.load(MODEL_PATH)
    model.backend.chat_template = template
    chat = types_pb2.Chat(messages=[types_pb2.ChatMessage(role="user", content="hi")])
    with pytest.raises(InvalidArgumentError) as refused:
        asyncio.run(encode_prompt(inference_pb2.GenerateRequest(chat=chat), "chat", model))
    assert refused.value.field == "chat.messages"
