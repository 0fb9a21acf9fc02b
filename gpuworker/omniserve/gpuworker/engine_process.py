"""Entry point of the engine process: loads the model, profiles the device, runs the loop."""

from __future__ import annotations

import ctypes
import dataclasses
import os
import signal
import time

import torch

from omniserve.attnkernel import Bell
from omniserve.errors import OmniServeError
from omniserve.gpuworker import profiler
from omniserve.gpuworker.channel import EngineChannel
from omniserve.gpuworker.device.cpu import CpuDevice
from omniserve.gpuworker.engine import Engine
from omniserve.gpuworker.latency_model import LatencyModel
from omniserve.gpuworker.model.weights import load_weights, open_model
from omniserve.gpuworker.settings import WorkerSettings
from omniserve.internal.v1 import attention_pb2, engine_pb2

_PR_SET_PDEATHSIG = 1


def run(settings: WorkerSettings, endpoint: str, bell_path: str) -> None:
    """Runs an engine until told to stop. Start errors go to the front as `EngineFailed`."""
    _die_with_parent()
    # The front says when to stop, also where a signal goes to the whole process group.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    channel = EngineChannel(endpoint)
    try:
        engine = _start(settings, channel, bell_path)
    except OmniServeError as error:
        failed = engine_pb2.EngineFailed(reason=error.reason, message=error.message)
        channel.send(engine_pb2.EngineEvent(failed=failed))
    else:
        engine.run()
    channel.close()


def _start(settings: WorkerSettings, channel: EngineChannel, bell_path: str) -> Engine:
    model = open_model(settings.model_path)
    config = model.config
    if settings.context_tokens_max:
        context_tokens = min(config.context_tokens, settings.context_tokens_max)
        config = dataclasses.replace(config, context_tokens=context_tokens)
    pages = settings.device_kv_tokens // settings.page_tokens
    weights = load_weights(model, getattr(torch, settings.dtype))
    device = CpuDevice(config, weights, pages, settings.page_tokens, settings.threads)
    profile = profiler.measure(device, settings.model, settings.page_tokens, pages)
    latency = LatencyModel(profile, config.layers)
    bell = Bell(bell_path, create=False)
    engine = Engine(settings, device, latency, channel, bell, time.monotonic_ns)
    device_tokens = pages * settings.page_tokens
    ready = engine_pb2.EngineReady(
        model=settings.model,
        context_tokens=config.context_tokens,
        vocabulary_tokens=config.vocabulary,
        ls_tokens_max=min(config.context_tokens, device_tokens),
        be_prompt_tokens_max=min(config.context_tokens, device_tokens // 2) - 1,
        geometry=attention_pb2.Geometry(
            layers=config.layers,
            heads=config.heads,
            kv_heads=config.kv_heads,
            head_dim=config.head_dim,
            dtype=settings.dtype,
            kv_dtype=settings.dtype if settings.kv_dtype == "auto" else settings.kv_dtype,
            page_tokens=settings.page_tokens,
            max_sequences=settings.be_sequences_max,
            max_sequence_tokens=config.context_tokens,
            slots=settings.be_sequences_max + settings.transfer_slots,
        ),
        layers=[attention_pb2.LayerOptions(window=window) for window in config.windows_tokens],
    )
    channel.send(engine_pb2.EngineEvent(ready=ready))
    return engine


def _die_with_parent() -> None:
    """An engine without its front holds memory and serves nobody."""
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)
