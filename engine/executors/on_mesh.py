"""A bundle on the ranks of this machine: the parts that its model's spec names are sharded, its other programs run whole on every rank."""

from __future__ import annotations

import logging
import signal
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file

from reelstep.compiler.backends import BACKENDS
from reelstep.compiler.bundle import AGAIN, Bundle
from reelstep.compiler.load import arch_here, build_engine, check_mesh, choose
from reelstep.compiler.program import Precision
from reelstep.compiler.sharded import check_part
from reelstep.compiler.skus import is_gpu
from reelstep.compiler.skus.cpu import SKU
from reelstep.compiler.storage import seal, sealed
from reelstep.engine.executors.bundles import Stored
from reelstep.engine.executors.patience import Allowance
from reelstep.engine.executors.processes import ShardedModel, World, start
from reelstep.engine.executors.restarting import Bounds, Restarting
from reelstep.engine.models import MODELS
from reelstep.engine.models.spec import ModelSettings, ModelSpec, hash_weights
from reelstep.engine.runner import Runner
from reelstep.engine.samplers.step_cache import PIECES
from reelstep.errors import BundleError, ConfigError
from reelstep.parallel.collectives import Communicator
from reelstep.parallel.mesh import Mesh

log = logging.getLogger(__name__)

START_S, LOAD_S, COLLECTIVE_S, SILENCE_S = 600.0, 3600.0, 60.0, 4.0
"""Ranks export their graphs at every start, which takes minutes on a busy machine; TensorRT may take many more for each engine that is not in the cache."""
BOUNDS = Bounds(starts=3, window_s=600.0, reruns=2)


@dataclass(frozen=True)
class BundleRanks:
    """What every rank of a bundle loads."""

    bundle: Stored
    sharded: ShardedModel

    def identity(self) -> Mapping[str, str]:
        if self.bundle.found == self.bundle.digest and not self.sharded.file.exists():  # another machine than the engine's
            bundle = self.bundle.open()
            weights_file(bundle, spec_of(bundle), self.bundle.cache)
        return {"bundle": self.bundle.found, **self.sharded.identity()}

    def load(self, comm: Communicator) -> Mapping[str, Runner]:
        """Raises BundleError for a bundle that was replaced since the first start."""
        if comm.rank > 0:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of a terminal; rank 0 says when the others end
        bundle = self.bundle.open()
        shared = self.sharded.load(comm)[self.sharded.name]
        chosen, wanted = choose(bundle, self.sharded.backend, self.sharded.precision)
        whole = {key: signature for key, signature in bundle.signatures.items() if key not in shared.executables}
        executables = {key: build_engine(bundle, key, chosen, wanted, self.bundle.cache) for key in whole}
        limits = {key: signature.max_batch for key, signature in whole.items()}
        return {self.sharded.name: Runner({**shared.executables, **executables}, {**shared.max_batch, **limits}, whole.keys())}


def open_on_mesh(bundle: Bundle, mesh: Mesh, cache: Path, backend: str | None = None, allowance: Allowance = BOUNDS.calls) -> Restarting:
    """The bundle's programs on a mesh of processes, of which this one is rank 0, and started again when a rank is lost.

    Warns of a mesh larger than this machine's cores. Raises, before any process starts, as `ranks_of`, and ConfigError for ranks on GPUs; then what a
    replica's start raises.
    """
    ranks = ranks_of(bundle, mesh, cache, backend)
    if is_gpu(arch_here(bundle, BACKENDS[ranks.sharded.backend])):
        text = f"{bundle.path} on mesh {mesh} by backend {ranks.sharded.backend!r}: ranks beside this process share a CPU"
        raise ConfigError(f"{text}; add `--cluster local`, whose ranks have a GPU each, or run it on the CPU with `--backend openvino`")
    if mesh.world > SKU.units:
        log.warning("mesh %s has %d ranks, and this machine %d cores: they wait for each other", mesh, mesh.world, SKU.units)
    return Restarting([partial(start, world_of(mesh, "gloo"), ranks)], replace(BOUNDS, calls=allowance))


def ranks_of(bundle: Bundle, mesh: Mesh, cache: Path, backend: str | None = None) -> BundleRanks:
    """The ranks of a mesh that share a bundle's model: in its plan's precision if it was planned for a mesh, else in float32.

    Weights of what is sharded are written into `cache` once, for the ranks to read their slices. Raises ConfigError for a model that does not say how
    it is sharded, a bundle with the pieces of step caches, a mesh larger than there are heads and one that the backend refuses, BundleError for a bundle of
    another version or other weights of the model.
    """
    check_mesh(bundle, mesh)
    spec = spec_of(bundle)
    for part in spec.sharding:
        check_part(part, mesh, spec.name)
    precision: Precision = bundle.plan.precision if bundle.plan.mesh and backend in (None, bundle.plan.backend) else "float32"
    chosen, _ = choose(bundle, backend, precision)
    if lacks := chosen.refuses(mesh, arch_here(bundle, chosen)):
        raise ConfigError(f"{bundle.path} on mesh {mesh} by backend {chosen.name!r}: {lacks}")
    lora = ModelSettings.from_json(bundle.settings).lora
    file = weights_file(bundle, spec, cache.absolute())
    return BundleRanks(Stored.of(bundle, cache), ShardedModel(spec.name, file, spec.sharding, chosen.name, lora, precision))


def world_of(mesh: Mesh, transport: str) -> World:
    return World(mesh, transport, start_s=START_S, load_s=LOAD_S, collective_s=COLLECTIVE_S, silence_s=SILENCE_S)


def spec_of(bundle: Bundle) -> ModelSpec:
    """The spec of a bundle's model, which says how it is sharded. Raises ConfigError, and BundleError for another version."""
    name, version = bundle.plan.model, bundle.plan.version
    able = [known for known, spec in MODELS.items() if spec.sharding]
    if name not in able:
        raise ConfigError(f"model {name!r} does not say how it is sharded; those that do: {', '.join(able) or 'none'}. Serve it without a mesh")
    spec = MODELS[name]
    if version != spec.version:
        raise BundleError(f"{bundle.path} has version {version} of {name!r}, and this package shards version {spec.version}; {AGAIN}")
    if any(program.quantised for program in bundle.plan.programs):
        raise ConfigError(f"{bundle.path} is quantised, and ranks share weights in float32 alone; serve it without a mesh, or compile it without --quantise")
    if pieces := sorted({program for program, _ in bundle.signatures} & set(PIECES)):
        raise ConfigError(f"{bundle.path} has {', '.join(pieces)} for step caches, which no rank can share; compile it without --step-cache")
    return spec


def weights_file(bundle: Bundle, spec: ModelSpec, cache: Path) -> Path:
    """safetensors in float32 with the names that the spec's parts ask for, checked to be the bundle's. Raises BundleError, StorageError."""
    module = spec.build()
    for program in spec.programs(module):
        own = program.module.state_dict()
        for profile in program.profiles:
            stored = bundle.manifest["programs"].get(program.name, {}).get(profile.name, {}).get("weights", {})
            if any(name in own and not torch.equal(own[name], bundle.tensors[there]) for name, there in stored.items()):
                raise BundleError(f"{bundle.path} has other weights in {program.name!r} than this package's {spec.name!r}; {AGAIN}")
    file = cache / f"weights-{hash_weights(module)}.safetensors"
    if not sealed(file):
        seal(file, lambda temporary: save_file(module.state_dict(), temporary))
    return file
