"""A small random Llama as a GGUF file, for tests of many passes, and its `transformers` twin.

Its greedy tokens depend on all that came before, as a trained model's do, and cost a thousandth.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from omniserve.shm import layout

LAYERS, HEADS, KV_HEADS, HEAD_DIM = 4, 4, 2, 32
HIDDEN = HEADS * HEAD_DIM
VOCABULARY = 512
CONTEXT_TOKENS = 2048
EOS = 2
PAGE_TOKENS = 16
NEAR_TIE = 1e-3
"""In logits, which spread over about 30."""

GEOMETRY = layout.Geometry(
    layers=LAYERS,
    heads=HEADS,
    kv_heads=KV_HEADS,
    head_dim=HEAD_DIM,
    dtype="float32",
    kv_dtype="float32",
    page_tokens=PAGE_TOKENS,
    max_sequences=64,
    max_sequence_tokens=CONTEXT_TOKENS,
    slots=64 + 2048,
)
ARENA_BYTES = layout.arena_bytes(GEOMETRY, 1024)


class TinyModel:
    """`path` is the file; `is_greedy` judges outputs by `transformers`."""

    def __init__(self, folder: Path, seed: int = 0) -> None:
        self.path = folder / "tiny.gguf"
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=HIDDEN,
            intermediate_size=2 * HIDDEN,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=KV_HEADS,
            max_position_embeddings=CONTEXT_TOKENS,
            initializer_range=0.15,
            tie_word_embeddings=False,
            eos_token_id=EOS,
        )
        self._model: Any = LlamaForCausalLM(config).float().eval()
        _write(self.path, self._model, config)

    def flags(self) -> dict[str, Any]:
        """Of a worker that serves it."""
        return {
            "model-path": self.path,
            "page-tokens": PAGE_TOKENS,
            "be-sequences-max": GEOMETRY.max_sequences,
        }

    def is_greedy(self, prompt: Sequence[int], output: Sequence[int]) -> bool:
        """Whether each token of `output` is the likeliest one, or nearly tied with it."""
        with torch.inference_mode():
            tokens = torch.tensor([[*prompt, *output[:-1]]])
            logits = self._model(tokens).logits[0, len(prompt) - 1 :]
        chosen = logits[torch.arange(len(output)), torch.tensor(output)]
        return bool((logits.max(dim=-1).values - chosen < NEAR_TIE).all())


def _write(path: Path, model: Any, config: Any) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_embedding_length(HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_vocab_size(VOCABULARY)
    writer.add_context_length(CONTEXT_TOKENS)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_eos_token_id(EOS)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, LAYERS)
    for name, tensor in model.state_dict().items():
        heads = {"q_proj": HEADS, "k_proj": KV_HEADS}.get(name.split(".")[-2])
        values = _interleaved(tensor, heads) if heads else tensor
        writer.add_tensor(names.get_name(name, (".weight",)), values.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """GGUF has the two halves of a rotated head interleaved. weight: [heads * head_dim, hidden]."""
    halves = weight.reshape(heads, 2, HEAD_DIM // 2, weight.shape[1])
    return halves.swapaxes(1, 2).reshape(weight.shape).contiguous()
