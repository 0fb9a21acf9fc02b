"""One request inside the engine, and where its KV is."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from omniserve.gpuworker.kv.block_states import BlockStates
from omniserve.gpuworker.sampling_params import GREEDY, SamplingParams


class Place(enum.Enum):
    """Where a request stands between arrival and end."""

    WAITING = enum.auto()
    PREFILLING = enum.auto()
    """On the device; its prompt's KV is being computed in chunks."""
    DEVICE = enum.auto()
    """On the device, decoding."""
    HOST = enum.auto()
    """Its KV is in an attention server's arena; it is a row of the parking lot."""
    RESTORING = enum.auto()
    """On its way from the arena back to the device; its parked row is held."""
    ENDED = enum.auto()


@dataclass(eq=False, slots=True)
class Request:
    """Owned by the engine's loop; nothing else writes it. Times are engine clock, in ns."""

    request_id: str
    latency_sensitive: bool
    tokens: npt.NDArray[np.int64]
    """[prompt + max_tokens]; the first `known` are set."""
    prompt_tokens: int
    arrival_ns: int
    tenant: str = ""
    sampling: SamplingParams = GREEDY
    generated_before: int = 0
    """Tokens at the prompt's end that another worker generated."""
    ignore_eos: bool = False
    ttft_slo_ns: int = 0
    tpot_slo_ns: int = 0

    place: Place = Place.WAITING
    known: int = 0
    """Tokens of prompt and output that are known."""
    computed: int = 0
    """Tokens whose KV is complete in every layer, on the device or in the arena."""
    blocks: list[int] = field(default_factory=list)
    """Device KV pages, in order. Full ones may be shared with other requests."""
    states: BlockStates = field(default_factory=BlockStates)
    """Of its KV blocks, on the device or in the arena."""
    digests: list[bytes] = field(default_factory=list)
    """Names of its first full blocks, as far as they were asked for."""
    exact: bool = True
    """None of its device KV came from, or through, an arena of lower precision."""
    cached_tokens: int = 0
    """Prompt tokens that it found computed when it first started."""
    dropped: int = 0
    """Tokens whose KV was given up when it went back to its queue."""
    in_cohort: bool = False
    """Member of a cohort that is on its way through the stages."""
    leaving: bool = False
    """Decodes no further on the device: it is demoted as soon as its last token is mirrored."""
    left_ns: int = 0
    """When it began to, or to come back to the device."""
    doomed: bool = False
    """Cancelled or failed: it ends as soon as none of its rows is on its way."""
    error: str = ""
    """Why it failed; empty if it was cancelled."""
    started_ns: int = 0
    """When its first stage began."""
    first_token_ns: int = 0
    last_token_ns: int = 0

    server: int = -1
    """Attention server that holds, or mirrors, its KV; -1 if none."""
    sequence: int = -1
    """Its slot id at that server."""
    row: int = -1
    """Its row in the parking lot; -1 unless HOST or RESTORING."""
    mirrored_sent: int = 0
    """Tokens handed to CHECKPOINT or appended by ATTEND."""
    mirrored: int = 0
    """Tokens that the arena is known to have in every layer; `host_kv` knows the latest."""
    transfers: int = 0
    """Slots of CHECKPOINT and RESTORE messages that are not answered yet."""
    restored: int = 0
    """Tokens asked for by RESTORE."""
    imports: int = 0
    """Copies of restored KV into its device pages that are under way: they are its own still."""

    @property
    def generated(self) -> int:
        return self.known - self.prompt_tokens

    @property
    def output(self) -> npt.NDArray[np.int64]:
        """Generated tokens, here or by another worker."""
        return self.tokens[self.prompt_tokens - self.generated_before : self.known]

    @property
    def job(self) -> str:
        """What the ids of a job's items have in common: all before the last colon."""
        return self.request_id.rpartition(":")[0]

    @property
    def limit(self) -> int:
        """Prompt plus max_tokens."""
        return len(self.tokens)

    def next_deadline_ns(self, aim: float = 1.0) -> float:
        """When the next output token is due: TTFT for the first, then one TPOT apart.

        `aim` scales the SLO, e.g. 0.8 for deadlines a fifth tighter than promised.
        """
        if self.generated == 0:
            return self.arrival_ns + self.ttft_slo_ns * aim
        return self.first_token_ns + self.generated * self.tpot_slo_ns * aim
