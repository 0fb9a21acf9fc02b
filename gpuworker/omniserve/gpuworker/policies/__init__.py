"""The policies, behind one interface, for comparison on the same engine."""

from __future__ import annotations

from omniserve.gpuworker.policies.base import Options, Policy
from omniserve.gpuworker.policies.ls_first import LsFirst
from omniserve.gpuworker.policies.ls_only import LsOnly
from omniserve.gpuworker.policies.omniserve import OmniServe
from omniserve.gpuworker.policies.preempt import Preempt
from omniserve.gpuworker.policies.reserve import Reserve
from omniserve.gpuworker.policies.sync_offload import SyncOffload

POLICIES: dict[str, type[Policy]] = {
    policy.name: policy for policy in (OmniServe, LsFirst, Reserve, SyncOffload, Preempt, LsOnly)
}

__all__ = ["POLICIES", "Options", "Policy"]
