"""An upper bound on BE tokens per second beside a given LS load, from what the machine can do.

Worker and servers share the machine's cores, so time on both cores together is what there is: a
second of it goes to LS passes and to BE tokens. A BE token costs

- its attention: KV bytes of its context / read bandwidth;
- its part of a prompt's prefill: 2 x parameters x prompt tokens / output tokens / matrix peak;
- its row of a dense pass over `rows` rows, which takes as long as the weights' reading or the
  rows' arithmetic, whichever is longer: max(weight bytes / bandwidth, 2 x parameters x rows /
  peak). In an LS pass that arithmetic is paid only beyond what hides behind the weights' reading.

How many rows go through together is what tells policies apart: on the device as many as its KV
holds; those that decode through servers too have half of the sequences in flight besides (the
servers have the other half). Nothing is taken off for Python, gRPC,
copies or scheduling.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Machine:
    """Measured in the run."""

    read_bytes_per_s: float
    matrix_flops: float


@dataclass(frozen=True)
class Model:
    """SmolLM2-135M in bfloat16, or another."""

    parameters: int
    """That a decode pass reads."""
    layer_parameters: int
    """That every token of a prompt goes through."""
    kv_bytes_per_token: int

    def pass_s(self, machine: Machine, rows: float) -> float:
        """The dense part of a decode pass."""
        read_s = 2 * self.parameters / machine.read_bytes_per_s
        return max(read_s, 2 * self.parameters * rows / machine.matrix_flops)


@dataclass(frozen=True)
class LsLoad:
    """What `ls-only` did at this load."""

    busy_share: float
    """Part of the time in which its engine worked."""
    passes_per_s: float
    rows_per_pass: float


@dataclass(frozen=True)
class BeWork:
    prompt_tokens: int
    output_tokens: int
    context_tokens: float
    """Mean over the tokens generated."""
    rows_max: int
    """That may go through a dense pass together."""


def tokens_per_s(machine: Machine, model: Model, ls: LsLoad, be: BeWork) -> float:
    """The best mix of rows that ride in LS passes and rows of passes of their own."""
    if be.rows_max == 0:
        return 0.0
    attention_s = be.context_tokens * model.kv_bytes_per_token / machine.read_bytes_per_s
    prompt_flops = 2 * model.layer_parameters * be.prompt_tokens
    other_s = attention_s + prompt_flops / be.output_tokens / machine.matrix_flops
    free_s = 1.0 - ls.busy_share
    own_s = model.pass_s(machine, be.rows_max) / be.rows_max + other_s
    alone_s = model.pass_s(machine, ls.rows_per_pass)
    best = 0.0
    for riding in range(be.rows_max + 1):
        added_s = model.pass_s(machine, ls.rows_per_pass + riding) - alone_s + riding * other_s
        used_s = added_s * ls.passes_per_s
        share = min(1.0, free_s / used_s) if used_s > 0 else 1.0
        left_s = free_s - share * used_s
        best = max(best, share * riding * ls.passes_per_s + left_s / own_s)
    return best
