"""Digests that name KV blocks: equal digests mean equal KV.

The KV of a block depends on all tokens up to its end. So its digest covers its tokens and the
digest of the block before it; the first one's covers the tenant, who must not learn from a fast
answer what another one asked, and the type of the KV.
"""

from __future__ import annotations

from hashlib import blake2b

import numpy as np
import numpy.typing as npt

_BYTES = 16


def root_digest(tenant: str, kv_dtype: str) -> bytes:
    """Returns what stands before the first block."""
    return blake2b(f"{kv_dtype}\0{tenant}".encode(), digest_size=_BYTES).digest()


def block_digest(parent: bytes, tokens: npt.NDArray[np.int64]) -> bytes:
    """tokens: those of one block. `parent` is the digest of the block before it, or the root's."""
    return blake2b(parent + tokens.tobytes(), digest_size=_BYTES).digest()
