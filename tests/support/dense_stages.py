"""A decoder's dense stages twice: in native kernels, and plainly in torch in double precision."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812

from omniserve.attnkernel import DenseModel, Slots, StageRows, Threads
from omniserve.gpuworker.model.weights import LayerWeights

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CONTEXT = 64
LAYERS = 2
EPSILON = 1e-5


@dataclass(frozen=True)
class Shape:
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int

    @property
    def q_size(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.kv_heads * self.head_dim


@dataclass
class Rows:
    """Rows before or behind a stage."""

    residual: torch.Tensor
    attention: torch.Tensor
    qkv: torch.Tensor


class Twin:
    """Random weights, packed for the native kernels and kept for the reference."""

    def __init__(
        self, shape: Shape, dtype: str, *, extras: bool, threads: int = 1, seed: int = 0
    ) -> None:
        self.shape = shape
        self.dtype = DTYPES[dtype]
        self._random = torch.Generator().manual_seed(seed)
        hidden = shape.hidden
        self.layers = [self._layer(extras) for _ in range(LAYERS)]
        self.embedding = self._tensor(shape.vocabulary, hidden)
        self.final_norm = 1 + self._tensor(hidden)
        self.head = self._matrix(shape.vocabulary, hidden)
        angles = torch.rand(CONTEXT, shape.head_dim // 2, generator=self._random) * 7
        self.cos, self.sin = angles.cos(), angles.sin()
        self.model = DenseModel(
            layers=LAYERS,
            hidden=hidden,
            heads=shape.heads,
            kv_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            intermediate=shape.intermediate,
            vocabulary=shape.vocabulary,
            context_tokens=CONTEXT,
            norm_epsilon=EPSILON,
            dtype=dtype,
            threads=Threads(threads, spin_us=50),
            cos=self.cos,
            sin=self.sin,
        )
        for index, layer in enumerate(self.layers):
            self.model.set_layer(index, **vars(layer))
        self.set_head(self.head)

    def set_head(self, head: torch.Tensor) -> None:
        """Replaces the LM head."""
        self.head = head
        self.model.set_ends(embedding=self.embedding, final_norm=self.final_norm, head=head)

    def _layer(self, extras: bool) -> LayerWeights:
        shape = self.shape
        width = shape.q_size + 2 * shape.kv_size
        return LayerWeights(
            attention_norm=1 + self._tensor(shape.hidden),
            qkv=self._matrix(width, shape.hidden),
            attention_out=self._matrix(shape.hidden, shape.q_size),
            mlp_norm=1 + self._tensor(shape.hidden),
            gate_up=self._matrix(2 * shape.intermediate, shape.hidden),
            down=self._matrix(shape.hidden, shape.intermediate),
            qkv_bias=self._tensor(width) if extras else None,
            q_norm=1 + self._tensor(shape.head_dim) if extras else None,
            k_norm=1 + self._tensor(shape.head_dim) if extras else None,
        )

    def rows(self, n: int) -> Rows:
        """Random rows, whose q, k and v are still to come."""
        width = self.shape.q_size + 2 * self.shape.kv_size
        return Rows(
            self._tensor(n, self.shape.hidden),
            self._tensor(n, self.shape.q_size),
            torch.full((n, width), torch.nan, dtype=self.dtype),
        )

    def run(
        self, stage: int, rows: Rows, tokens: Sequence[int], positions: Sequence[int]
    ) -> torch.Tensor | None:
        """Runs `stage` natively, in place; returns the logits of the last.

        Its best tokens must be theirs, whichever logits are wanted, and others stay untouched.
        """
        owner = StageRows(rows.residual, [Slots(rows.attention, rows.qkv)])
        at, ids = np.array(positions, np.int64), np.array(tokens, np.int64)
        part = (owner, None, None, None, at, ids)
        if stage < LAYERS:
            self.model.run(stage, [part])
            return None
        logits = torch.full((len(at), self.shape.vocabulary), torch.nan)
        best = np.full(len(at), -1, np.int64)
        self.model.finish([part], best, logits, np.ones(len(at), np.bool_))
        numbers = logits.isfinite().all(dim=1).numpy()
        assert (best == logits.argmax(dim=1).numpy())[numbers].all()
        some, again = torch.full_like(logits, torch.nan), np.full_like(best, -1)
        wanted = np.arange(len(at)) % 3 == 1
        self.model.finish([part], again, some, wanted)
        assert some[wanted].nan_to_num().equal(logits[wanted].nan_to_num())
        assert some[~wanted].isnan().all()
        self.model.finish([part], best)
        assert (again == best).all()
        return logits

    def reference(
        self, stage: int, rows: Rows, tokens: Sequence[int], positions: Sequence[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns (residual, q k v) behind `stage`, or (residual, logits) behind the last."""
        residual = rows.residual.double()
        if stage == 0:
            residual = self.embedding[list(tokens)].double()
        else:
            residual = self._leave(stage - 1, residual, rows.attention.double())
        if stage == LAYERS:
            return residual, self._norm(residual, self.final_norm) @ self.head.double().T
        layer = self.layers[stage]
        qkv = self._norm(residual, layer.attention_norm) @ layer.qkv.double().T
        if layer.qkv_bias is not None:
            qkv = qkv + layer.qkv_bias.double()
        return residual, self._turned(qkv, layer, positions)

    def _leave(self, index: int, residual: torch.Tensor, attention: torch.Tensor) -> torch.Tensor:
        layer = self.layers[index]
        residual = residual + attention @ layer.attention_out.double().T
        gate_up = self._norm(residual, layer.mlp_norm) @ layer.gate_up.double().T
        gate, up = gate_up.chunk(2, dim=-1)
        return residual + (F.silu(gate) * up) @ layer.down.double().T

    def _turned(
        self, qkv: torch.Tensor, layer: LayerWeights, positions: Sequence[int]
    ) -> torch.Tensor:
        shape = self.shape
        cos = self.cos[list(positions)].double().unsqueeze(1)
        sin = self.sin[list(positions)].double().unsqueeze(1)
        q, k = qkv[:, : shape.q_size], qkv[:, shape.q_size : -shape.kv_size]
        turned = []
        for heads, weight in ((q, layer.q_norm), (k, layer.k_norm)):
            split = heads.reshape(len(heads), -1, shape.head_dim)
            if weight is not None:
                split = self._norm(split, weight)
            low, high = split.chunk(2, dim=-1)
            both = torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1)
            turned.append(both.reshape(heads.shape))
        return torch.cat([*turned, qkv[:, -shape.kv_size :]], dim=1)

    def _norm(self, values: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(values, (values.shape[-1],), weight.double(), EPSILON)

    def _matrix(self, outputs: int, inputs: int) -> torch.Tensor:
        return self._tensor(outputs, inputs, scale=inputs**-0.5)

    def _tensor(self, *shape: int, scale: float = 0.5) -> torch.Tensor:
        return (torch.randn(shape, generator=self._random) * scale).to(self.dtype)
