"""Which device a worker runs on."""

from __future__ import annotations

import logging
import platform
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch

from omniserve import attnkernel
from omniserve.errors import SettingsError
from omniserve.gpuworker.device.cpu import CpuDevice
from omniserve.gpuworker.device.port import Device
from omniserve.gpuworker.model.config import ModelConfig
from omniserve.gpuworker.model.weights import DecoderWeights
from omniserve.gpuworker.settings import WorkerSettings

_log = logging.getLogger(__name__)


def open_device(settings: WorkerSettings, config: ModelConfig, weights: DecoderWeights) -> Device:
    """Raises SettingsError, with the field, if this host has no such device."""
    if settings.device == "cuda":
        return _cuda(settings, config, weights)
    return CpuDevice(
        config,
        weights,
        settings.device_kv_tokens // settings.page_tokens,
        settings.page_tokens,
        settings.threads,
        parked_rows=settings.parked_rows,
    )


def hardware(settings: WorkerSettings) -> tuple[str, str]:
    """Returns the device's name and what runs on it: a profile is good for these alone."""
    if settings.device == "cuda":
        kernels = "plain"
        if find_spec("flashinfer") is not None:
            kernels = f"flashinfer {version('flashinfer-python')}"
        return torch.cuda.get_device_name(), f"torch {torch.__version__}, {kernels}"
    core = Path(attnkernel.__path__[0]).glob("_core*.so")
    build = [f"{stat.st_size}-{stat.st_mtime_ns}" for stat in sorted(c.stat() for c in core)]
    return _cpu_name(), " ".join([attnkernel.kernel_name(), *build])


def _cuda(settings: WorkerSettings, config: ModelConfig, weights: DecoderWeights) -> Device:
    # Late: a worker without a GPU needs none of it.
    from omniserve.gpuworker.device.cuda.device import CudaDevice, Sizes
    from omniserve.gpuworker.device.cuda.gpu import TorchGpu
    from omniserve.gpuworker.device.cuda.kernels import Kernels

    if not torch.cuda.is_available():
        raise SettingsError("device: cuda, but torch finds no CUDA device", field="device")
    kernels = Kernels.flashinfer(config, settings.page_tokens, weights.embedding.dtype)
    if kernels is None:
        _log.warning("plain torch: with FlashInfer, for 16-bit types, it is many times faster")
        kernels = Kernels.plain(config)
    return CudaDevice(TorchGpu(), config, weights, kernels, Sizes.of(settings, config))


def _cpu_name() -> str:
    """As the kernel calls it; the architecture where it does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
