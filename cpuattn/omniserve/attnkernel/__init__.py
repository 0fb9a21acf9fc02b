"""The native core: attention over paged KV, dense layers, and the worker's side of a segment.

The worker imports it for its own pages (`PagedKv`), for the dense part of a model (`DenseModel`)
and to talk to attention servers (`WorkerLink`, `Bell`); the attention server runs its hot loop
from it.
"""

from omniserve.attnkernel._core import (
    KIND_ATTEND,
    KIND_CHECKPOINT,
    KIND_FREE,
    KIND_RESTORE,
    STATUS_BAD_COUNT,
    STATUS_BAD_KIND,
    STATUS_BAD_LAYER,
    STATUS_BAD_POSITION,
    STATUS_BAD_SEQUENCE,
    STATUS_FREED,
    STATUS_NO_PAGE,
    STATUS_OK,
    Bell,
    DenseModel,
    Geometry,
    PagedKv,
    Slots,
    StageRows,
    Threads,
    WorkerLink,
    kernel_name,
    kernel_names,
    use_kernel,
)

__all__ = [
    "KIND_ATTEND",
    "KIND_CHECKPOINT",
    "KIND_FREE",
    "KIND_RESTORE",
    "STATUS_BAD_COUNT",
    "STATUS_BAD_KIND",
    "STATUS_BAD_LAYER",
    "STATUS_BAD_POSITION",
    "STATUS_BAD_SEQUENCE",
    "STATUS_FREED",
    "STATUS_NO_PAGE",
    "STATUS_OK",
    "Bell",
    "DenseModel",
    "Geometry",
    "PagedKv",
    "Slots",
    "StageRows",
    "Threads",
    "WorkerLink",
    "kernel_name",
    "kernel_names",
    "use_kernel",
]
