"""FlashInfer's kernels, compiled at once.

It compiles each module when it is called first, one after the other: minutes on a host whose cache
is empty. A module that comes compiled (flashinfer-jit-cache) or is in the cache takes no time.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import torch

_NO_POSITION_ENCODING = 0


def compile_modules(kinds: Iterable[tuple[int, bool]], dtype: torch.dtype) -> None:
    """Compiles all that is called for models of `dtype`.

    kinds: (head dimension, whether a window limits it) of their layers. Raises RuntimeError with
    the compiler's output, OSError if there is no ninja. No GPU has run them yet.
    """
    from flashinfer.jit import gen_act_and_mul_module, gen_batch_prefill_module
    from flashinfer.jit.norm import gen_norm_module
    from flashinfer.jit.rope import gen_rope_module

    specs = [gen_norm_module(), gen_act_and_mul_module("silu"), gen_rope_module()]
    for head_dim, window in kinds:
        types, dims = (dtype, dtype, dtype, torch.int32), (head_dim, head_dim)
        specs.append(
            gen_batch_prefill_module(
                "fa2", *types, *dims, _NO_POSITION_ENCODING, window, False, False
            )
        )
    missing = [spec for spec in specs if not spec.is_aot]
    with ThreadPoolExecutor(len(specs)) as pool:
        # Not FlashInfer's build_jit_specs: it keeps ninja's log elsewhere, and what it has built
        # is built again when it is called.
        list(pool.map(lambda spec: spec.build(verbose=False), missing))
