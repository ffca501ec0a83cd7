"""A network becomes a plan: tuned on this GPU, without its weights, for one row and for any number of rows."""

from __future__ import annotations

from pathlib import Path

import tensorrt as trt

from reelstep.compiler.backends import Watch
from reelstep.compiler.backends.tensorrt.network import Network
from reelstep.compiler.backends.tensorrt.records import Progress, Records
from reelstep.compiler.signature import Signature
from reelstep.compiler.storage import seal, sealed, write_file
from reelstep.errors import CompileError

STREAM_ABOVE = 0.5
"""Share of the GPU's memory. A plan with more weights can keep some in host memory: the rest is for activations and other programs. It costs speed."""


def row_ranges(max_batch: int) -> tuple[tuple[int, int], ...]:
    """Fewest and most rows of each optimisation profile. TensorRT tunes for the most; one row, the common call, gets a profile of its own."""
    return ((1, 1),) if max_batch == 1 else ((1, 1), (1, max_batch))


def build_plan(network: Network, signature: Signature, timings: Path | None, streams: bool, records: Records, watch: Watch) -> bytes:
    """The serialised plan.

    timings: file of the timing cache, read if it is one of this GPU and TensorRT, and written. streams: weights may stay in host memory. Raises
    CompileError with what TensorRT said, StorageError if the timings cannot be written, and whatever `watch` raises.
    """
    where = f"program {signature.program!r} at profile {signature.profile!r}"
    config = network.builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.LAYER_NAMES_ONLY
    config.clear_flag(trt.BuilderFlag.TF32)  # it rounds float32 inputs of products to 10 bits; where the graph says float32 that is what it asks for
    config.set_flag(trt.BuilderFlag.REFIT)  # and not REFIT_IDENTICAL: other weights come, those of a LoRA variant
    config.set_flag(trt.BuilderFlag.STRIP_PLAN)
    if streams:
        config.set_flag(trt.BuilderFlag.WEIGHT_STREAMING)
    _add_profiles(network, signature, config)
    cache = _timing_cache(config, timings)
    progress = Progress(watch, where)
    config.progress_monitor = progress
    plan = network.builder.build_serialized_network(network.definition, config)
    if progress.stopped is not None:
        raise progress.stopped
    if plan is None:
        rows = " and ".join(f"{low}..{high}" for low, high in row_ranges(signature.max_batch))
        raise CompileError(
            f"{where} cannot be built by TensorRT {trt.__version__} for {rows} rows ({network.definition.num_layers} layers, whose names hold the "
            f"operator and the node of the graph). {records.explain()}"
        )
    if timings is not None:
        seal(timings, lambda temporary: write_file(temporary, bytes(memoryview(cache.serialize()))))
    return bytes(memoryview(plan))


def _add_profiles(network: Network, signature: Signature, config: trt.IBuilderConfig) -> None:
    for low, high in row_ranges(signature.max_batch):
        profile = network.builder.create_optimization_profile()
        for name, edge in zip(network.inputs, signature.inputs, strict=True):
            profile.set_shape(name, (low, *edge.sizes), (high, *edge.sizes), (high, *edge.sizes))
        index = config.add_optimization_profile(profile)
        if index < 0:
            raise CompileError(f"TensorRT refuses the profile of {low}..{high} rows of program {signature.program!r} at profile {signature.profile!r}")


def _timing_cache(config: trt.IBuilderConfig, timings: Path | None) -> trt.ITimingCache:
    """The cache in use: the file's, or an empty one where there is none or it is of another GPU or version."""
    cache = config.create_timing_cache(timings.read_bytes() if timings is not None and sealed(timings) else b"")
    if cache is None or not config.set_timing_cache(cache, False):
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, False)
    return cache
