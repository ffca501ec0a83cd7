"""A whole model becomes this rank's: narrower weights, read already cut, and collectives where its rule table says. No `forward` is touched."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from reelstep.errors import BundleError, ConfigError
from reelstep.parallel.collectives import Communicator
from reelstep.parallel.context import Attended
from reelstep.parallel.mesh import bounds, shares
from reelstep.parallel.rules import Axes, Rules, matching
from reelstep.parallel.tensor import Cut, cut_of, split_layer


@contextmanager
def empty_weights() -> Iterator[None]:
    """Inside, modules are built with their parameters on the meta device and their buffers as ever, so that a model of any size costs nothing.

    Under `torch.device("meta")` buffers that no file holds (a table of frequencies) would lose their values.
    """
    register = nn.Module.register_parameter

    def register_empty(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        register(self, name, param if param is None else nn.Parameter(param.to("meta"), requires_grad=param.requires_grad))

    nn.Module.register_parameter = register_empty  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def shard(module: nn.Module, rules: Rules, comm: Communicator, file: Path | None, prefix: str = "", dtype: torch.dtype | None = None) -> nn.Module:
    """`module`, built by `empty_weights`, changed into this rank's part and given back, in evaluation mode.

    file: safetensors with the whole model; each rank reads its own slices. None: weights stay empty, in the shapes of this rank's part. prefix: of the
    module's names in the file ("denoiser."). dtype: of floating weights; the file's if None. Raises ConfigError for a table that does not fit the
    module or a mesh too large for it, BundleError for a file without a tensor of the module or with another shape.
    """
    units = _units(module, rules, comm)
    names = [name for name, _ in module.named_parameters()]
    buffers = dict(module.named_buffers())
    names += [name for name in module.state_dict() if name in buffers]
    whole = {name: tuple(_get(module, name).shape) for name in names}
    cuts = {name: cut_of(name, whole[name], rules.of_parameter(name), rules, units, comm) for name in names}
    if file is None:
        _narrow(module, cuts)
    else:
        _load(module, cuts, file, prefix, dtype)
    for name, buffer in module.named_buffers():
        if buffer.is_meta and file is not None:
            raise ConfigError(f"buffer {name!r} is on the meta device and in no file; build the module inside empty_weights(), which keeps buffers")
    _set_shares(module, rules, comm)
    lengths = Lengths(rules, comm)
    layers: dict[str, dict[str, Cut]] = {}
    for name, cut in cuts.items():
        if cut is not None:
            path, _, own = name.rpartition(".")
            layers.setdefault(path, {})[own] = cut
    for path, own_cuts in layers.items():
        _put(module, path, split_layer(path, module.get_submodule(path), own_cuts, comm))
    _install(module, rules, lengths)
    for path, rule in matching(rules.attention, _paths(module)).items():
        for joined in (rule.queries, rule.keys):
            if len({bool(lengths.mesh_axes((logical,))) for logical in joined}) > 1:
                raise ConfigError(f"{path} joins {' and '.join(joined)}, of which only some are split; put all of them on one mesh axis, or none")
        if lengths.are_split((*rule.queries, *rule.keys)):
            _put(module, path, Attended(module.get_submodule(path), rule, lengths.of, comm))
    return module.eval().requires_grad_(False)


def layer_at(module: nn.Module, path: str) -> nn.Module:
    """What stands on a rank where the network, as it was built, has a layer: between them may be what was put around its attention."""
    for name in path.split("."):
        module = (module.inner if isinstance(module, Attended) else module).get_submodule(name)
    return module


class Lengths:
    """How long each logical axis's share is on every rank: written where a tensor is split, read where its parts meet again."""

    def __init__(self, rules: Rules, comm: Communicator) -> None:
        self.rules, self.comm = rules, comm
        self.sizes: dict[str, tuple[int, ...]] = {}

    def mesh_axes(self, axes: Axes) -> list[Any]:
        return [axis for logical in axes if logical and (axis := self.rules.axes[logical]) is not None]

    def are_split(self, axes: Axes) -> bool:
        """Whether several ranks share any of them."""
        return any(self.comm.size(axis) > 1 for axis in self.mesh_axes(axes))

    def of(self, axes: Axes) -> tuple[int, ...] | None:
        """Of a sequence that joins these axes, on every cp rank; None if it is whole on all of them."""
        split = [self.sizes[logical] for logical in axes if self.mesh_axes((logical,)) and logical in self.sizes]
        return tuple(map(sum, zip(*split, strict=True))) if split else None

    def split(self, x: Tensor, axes: Axes) -> Tensor:
        """This rank's part of a whole tensor."""
        for dim, logical in enumerate(axes):
            for axis in self.mesh_axes((logical,)):
                sizes = shares(x.shape[dim], self.comm.size(axis), f"{logical} tokens")
                self.sizes[logical] = sizes
                start, stop = bounds(sizes)[self.comm.at[axis]]
                x = x.narrow(dim, start, stop - start)
        return x

    def gather(self, x: Tensor, axes: Axes) -> Tensor:
        """The whole of what `split` had split."""
        for dim, logical in enumerate(axes):
            for axis in self.mesh_axes((logical,)):
                x = self.comm.all_gather(x, axis, dim, self.sizes[logical])
        return x


def _paths(module: nn.Module) -> list[str]:
    return [path for path, _ in module.named_modules()]


def _units(module: nn.Module, rules: Rules, comm: Communicator) -> dict[str, int]:
    """Logical axes that split in whole units, and how many there are, read from the modules that count them."""
    units: dict[str, int] = {}
    for path, (logical, count) in counts_of(module, rules).items():
        if units.setdefault(logical, count) != count:
            raise ConfigError(f"{path} counts {count} {logical}, and another module {units[logical]}; give them different logical axes")
    for logical, count in units.items():
        axis = rules.axes[logical]
        if axis is not None:
            shares(count, comm.size(axis), logical)
    return units


def counts_of(module: nn.Module, rules: Rules) -> dict[str, tuple[str, int]]:
    """The integer attributes of modules that count a logical axis, by path: which axis, and how many."""
    counts = {f"{path}.{name}": value for path, sub in module.named_modules() for name, value in vars(sub).items() if type(value) is int}
    return {path: (logical, counts[path]) for path, logical in matching(rules.attributes, counts).items()}


def _set_shares(module: nn.Module, rules: Rules, comm: Communicator) -> None:
    for path, (logical, count) in counts_of(module, rules).items():
        axis = rules.axes[logical]
        if axis is not None:
            owner, _, name = path.rpartition(".")
            setattr(module.get_submodule(owner), name, shares(count, comm.size(axis), logical)[comm.at[axis]])


def _install(module: nn.Module, rules: Rules, lengths: Lengths) -> None:
    """Hooks that split inputs and what is made whole, and gather outputs."""
    for path, arguments in matching(rules.inputs, _paths(module)).items():
        active = {i: axes for i, axes in arguments.items() if lengths.are_split(axes)}
        if active:
            module.get_submodule(path).register_forward_pre_hook(_splitting(active, lengths))
    for path, axes in matching(rules.made, _paths(module)).items():
        if lengths.are_split(axes):
            module.get_submodule(path).register_forward_hook(_keeping(axes, lengths))
    for path, axes in matching(rules.outputs, _paths(module)).items():
        if lengths.are_split(axes):
            module.get_submodule(path).register_forward_hook(_gathering(axes, lengths))


def _splitting(arguments: Mapping[int, Axes], lengths: Lengths) -> Any:
    return lambda _, args: tuple(lengths.split(value, arguments[i]) if i in arguments else value for i, value in enumerate(args))


def _keeping(axes: Axes, lengths: Lengths) -> Any:
    return lambda _, args, output: lengths.split(output, axes).clone()  # a view would keep the whole


def _gathering(axes: Axes, lengths: Lengths) -> Any:
    return lambda _, args, output: lengths.gather(output, axes)


def _load(module: nn.Module, cuts: Mapping[str, Cut | None], file: Path, prefix: str, dtype: torch.dtype | None) -> None:
    with safe_open(file, "pt", device="cpu") as tensors:
        there = set(tensors.keys())
        missing = [prefix + name for name in cuts if prefix + name not in there]
        if missing:
            some = ", ".join(missing[:4]) + (", ..." if len(missing) > 4 else "")
            raise BundleError(f"{file} has no {some}; is it of another model, or the prefix {prefix!r} wrong?")
        for name, cut in cuts.items():
            stored = tensors.get_slice(prefix + name)
            here = _get(module, name)
            if tuple(stored.get_shape()) != tuple(here.shape):
                raise BundleError(f"{file}: {prefix + name} has shape {stored.get_shape()}; the module's is {list(here.shape)}")
            value = _read(stored, cut)
            if dtype is not None and value.is_floating_point():
                value = value.to(dtype)
            _put(module, name, nn.Parameter(value, requires_grad=False) if isinstance(here, nn.Parameter) else value)


def _narrow(module: nn.Module, cuts: Mapping[str, Cut | None]) -> None:
    for name, cut in cuts.items():
        whole = _get(module, name)
        if cut is not None:
            shape = [cut.size if dim == cut.dim else size for dim, size in enumerate(whole.shape)]
            _put(module, name, nn.Parameter(whole.new_empty(shape), requires_grad=False))


def _read(stored: Any, cut: Cut | None) -> Tensor:
    """This rank's part, in memory of its own: a slice along the first dim comes as a view of the whole."""
    if cut is None:
        return stored[...] if stored.get_shape() else stored[()]  # type: ignore[no-any-return]
    parts = [stored[(slice(None),) * cut.dim + (slice(start, stop),)] for start, stop in cut.ranges]
    return torch.cat(parts, dim=cut.dim) if len(parts) > 1 else parts[0].clone(memory_format=torch.contiguous_format)


def _get(module: nn.Module, path: str) -> Any:
    owner, _, name = path.rpartition(".")
    return getattr(module.get_submodule(owner), name)


def _put(module: nn.Module, path: str, new: nn.Module | Tensor) -> None:
    owner, _, name = path.rpartition(".")
    setattr(module.get_submodule(owner), name, new)
