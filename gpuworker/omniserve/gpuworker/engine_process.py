"""Entry point of the engine process: loads the model, profiles the device, runs the loop."""

from __future__ import annotations

import ctypes
import dataclasses
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable

import torch

from omniserve import attnkernel, logs
from omniserve.attnkernel import Bell
from omniserve.errors import OmniServeError, SettingsError
from omniserve.gpuworker import latency_cache, profiler
from omniserve.gpuworker.channel import EngineChannel
from omniserve.gpuworker.device.opening import hardware, open_device
from omniserve.gpuworker.device.port import Device
from omniserve.gpuworker.engine import Engine
from omniserve.gpuworker.latency_model import LatencyModel
from omniserve.gpuworker.model.config import ModelConfig
from omniserve.gpuworker.model.weights import DecoderWeights, load_weights, open_model
from omniserve.gpuworker.policies import POLICIES, Options
from omniserve.gpuworker.settings import WorkerSettings
from omniserve.internal.v1 import attention_pb2, engine_pb2
from omniserve.latency import LatencyProfile

_log = logging.getLogger(__name__)
_PR_SET_PDEATHSIG = 1


OpenDevice = Callable[[WorkerSettings, ModelConfig, DecoderWeights], Device]


def run(
    settings: WorkerSettings,
    front: socket.socket,
    bell_path: str,
    open_device: OpenDevice = open_device,
) -> None:
    """Runs an engine until told to stop. Start errors go to the front as `EngineFailed`."""
    _die_with_parent()
    logs.configure("gpuworker", settings.log_level, settings.log_format)
    # The front says when to stop, also where a signal goes to the whole process group.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    bell = Bell(bell_path, create=False)
    channel = EngineChannel(front, bell)
    try:
        engine = _start(settings, channel, bell, open_device)
    except OmniServeError as error:
        failed = engine_pb2.EngineFailed(reason=error.reason, message=error.message)
        channel.send(engine_pb2.EngineEvent(failed=failed))
    else:
        try:
            engine.run()
        except Exception:  # said here, as multiprocessing would not say it in the logs' format
            _log.critical("the engine failed", exc_info=True)
            sys.exit(1)
    channel.close()


def _start(
    settings: WorkerSettings, channel: EngineChannel, bell: Bell, open_device: OpenDevice
) -> Engine:
    _check_host(settings)
    model = open_model(settings.model_path, settings.load_format)
    config = model.config
    if settings.context_tokens_max:
        context_tokens = min(config.context_tokens, settings.context_tokens_max)
        config = dataclasses.replace(config, context_tokens=context_tokens)
    if settings.attention_servers and settings.transfer_slots < config.layers:
        message = f"transfer_slots must be at least the {config.layers} layers of the model"
        raise SettingsError(message, field="transfer_slots")
    pages = settings.device_kv_tokens // settings.page_tokens
    weights = load_weights(model, getattr(torch, settings.dtype))
    device = open_device(settings, config, weights)
    latency = LatencyModel(_profile(settings, device, pages), config.layers)
    has_servers = bool(settings.attention_server_addresses)
    options = Options(
        settings.prefill_chunk_tokens_max,
        settings.be_placement if has_servers else "device",
        settings.reserve_headroom,
    )
    policy = POLICIES[settings.policy](options)
    engine = Engine(settings, device, latency, policy, channel, bell, time.monotonic_ns)
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


def _check_host(settings: WorkerSettings) -> None:
    """Takes the kernels that are asked for. Raises SettingsError, with the field, if it cannot.

    Here is what can be found out before a model is read.
    """
    if settings.kernel != "auto":
        try:
            attnkernel.use_kernel(settings.kernel)
        except ValueError as error:
            raise SettingsError(f"kernel: {error}", field="kernel") from error
    if settings.device == "cpu" and settings.dtype == "float16":
        message = "dtype: the cpu back end has float32 and bfloat16, no float16"
        raise SettingsError(message, field="dtype")


def _profile(settings: WorkerSettings, device: Device, pages: int) -> LatencyProfile:
    """Returns the stages' times, measured now if this is the first start of its kind."""
    config = device.config
    name, software = hardware(settings)
    shape = (config.layers, config.hidden, config.intermediate, config.vocabulary)
    heads = (config.heads, config.kv_heads, config.head_dim)
    key = latency_cache.ProfileKey(
        hardware=name,
        model_shape=(*shape, *heads, settings.page_tokens),
        dtype=settings.dtype,
        threads=settings.threads,
        kernel=software,
    )
    return latency_cache.cached(
        settings.latency_cache_dir,
        key,
        lambda: profiler.measure(device, key.hardware, settings.model, settings.page_tokens, pages),
        lambda profile: profiler.was_disturbed(device, profile),
    )


def _die_with_parent() -> None:
    """An engine without its front holds memory and serves nobody."""
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)
