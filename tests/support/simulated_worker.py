"""A worker with the `cuda` back end on a simulated GPU: `python -m support.simulated_worker`."""

from __future__ import annotations

import socket

from support.simulated_gpu import SimulatedGpu

from omniserve.gpuworker import engine_process
from omniserve.gpuworker.__main__ import main
from omniserve.gpuworker.device.cuda.device import CudaDevice, Sizes
from omniserve.gpuworker.device.cuda.kernels import Kernels
from omniserve.gpuworker.device.port import Device
from omniserve.gpuworker.model.config import ModelConfig
from omniserve.gpuworker.model.weights import DecoderWeights
from omniserve.gpuworker.settings import WorkerSettings


def open_device(settings: WorkerSettings, config: ModelConfig, weights: DecoderWeights) -> Device:
    gpu, kernels = SimulatedGpu(settings.fault_seed), Kernels.plain(config)
    return CudaDevice(gpu, config, weights, kernels, Sizes.of(settings, config))


def engine(settings: WorkerSettings, front: socket.socket, bell_path: str) -> None:
    # Its profile is not that of this host's CPU.
    own = settings.model_copy(update={"latency_cache_dir": settings.shm_dir / "profiles"})
    engine_process.run(own, front, bell_path, open_device)


if __name__ == "__main__":
    main(engine)
