"""Low-rank adapters: read from safetensors files as the field spells them, fused into weights, or packed as the input of a program that takes them.

Hu et al. 2021, arXiv:2106.09685: W + strength * (alpha / r) * B A, with A [r, inputs] and B [outputs, r].
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn import Linear

from reelstep.compiler.lora import Layer, Layout, patterns
from reelstep.engine.request import PEFT_FILE
from reelstep.errors import ConfigError

PARTS = {
    ".lora_A.weight": "down", ".lora_B.weight": "up",  # PEFT, diffusers
    ".lora_down.weight": "down", ".lora_up.weight": "up",  # kohya
    ".lora.down.weight": "down", ".lora.up.weight": "up",  # diffusers before PEFT
    ".alpha": "alpha",
}  # fmt: skip
DTYPES = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
WHOLE = ("I64", "I32")
"""Of a file's numbers, by the names of safetensors; an alpha may be a whole one."""
DOTTED = ("", "transformer.", "diffusion_model.", "base_model.model.")
"""What may stand before a layer's path."""
FLAT = ("lora_unet_", "lora_transformer_")
"""Before a path whose dots are underscores, as kohya writes it."""
BASE = "base_model"
"""In a file's metadata: the model that it was trained on, by its name here."""
CONFIG = "lora_adapter_metadata"
"""In a file's metadata: PEFT's configuration in JSON, as diffusers saves it."""

Pair = tuple[Tensor, Tensor]
"""down [r, inputs] and up [outputs, r], float32, alpha / r in `up`."""


@dataclass(frozen=True)
class Adapter:
    """One LoRA. pairs: by layer. base: the model that the file names, or empty. digest: sha256 of the file."""

    pairs: Mapping[str, Pair]
    base: str
    digest: str

    @property
    def rank(self) -> int:
        """The largest of all layers."""
        return max(len(down) for down, _ in self.pairs.values())

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of what it does to a model: two files with one fingerprint are one adapter, and one file with two configurations is two."""
        hashed = hashlib.sha256()
        for name, pair in sorted(self.pairs.items()):
            hashed.update(json.dumps([name, *(matrix.shape for matrix in pair)]).encode())
            for matrix in pair:
                hashed.update(matrix.contiguous().numpy().data)
        return hashed.hexdigest()


CHANGE_THE_REST = ("pissa", "corda", "olora", "loftq", "lora_ga")
"""Ways of PEFT to begin that take the adapter's first value out of the weights beside it."""

Blend = Iterable[tuple[Adapter, float]]
"""Adapters and the strength of each; their changes add up."""


def read_adapter(file: Path, model: str, layers: tuple[Layer, ...], config: str | None = None, called: str = "") -> Adapter:
    """A LoRA for `model`, whose layers these are. Nothing is unpickled. config: the text of PEFT's, or empty for none; None: look for it beside the file.

    Raises ConfigError naming the file, or what it is called, and the key in it, for what is no safetensors file, is for another model, adapts what is not
    among the layers, has a shape that does not fit, half a pair, numbers that are not finite, or is another kind of adapter.
    """
    try:
        with safe_open(file, "pt", device="cpu") as opened:
            metadata: Mapping[str, str] = opened.metadata() or {}
            keys = list(opened.keys())
            _check_base(metadata, model)
            found = _sort(keys, model, layers)
            scaling = _config(file, keys, metadata, config)
            pairs = {layer.name: _pair(opened, found[layer.name], layer, scaling) for layer in layers if layer.name in found}
        return Adapter(pairs, metadata.get(BASE, ""), hashlib.sha256(file.read_bytes()).hexdigest())
    except SafetensorError as error:
        raise ConfigError(f"LoRA {called or file}: no safetensors file, or not a whole one ({error}); copy it again, or save the LoRA as one") from error
    except (OSError, ValueError, OverflowError) as error:  # of JSON and its numbers too; ConfigError is one
        raise ConfigError(f"LoRA {called or file}: {error}") from error


def _check_base(metadata: Mapping[str, str], model: str) -> None:
    if metadata.get(BASE, model) != model:
        raise ConfigError(f"it was trained on {metadata[BASE]!r} and this is {model!r}; take that model, or a LoRA for this one")


def _sort(keys: Iterable[str], model: str, layers: tuple[Layer, ...]) -> dict[str, dict[str, str]]:
    """From layer and part to the key. Raises ConfigError for a key that is no part of a LoRA of these layers, two for one part, and for half a pair."""
    spelled = {f"{prefix}{layer.name}{end}": (layer.name, part) for layer in layers for end, part in PARTS.items() for prefix in DOTTED}
    spelled |= {f"{prefix}{layer.name.replace('.', '_')}{end}": (layer.name, part) for layer in layers for end, part in PARTS.items() for prefix in FLAT}
    found: dict[str, dict[str, str]] = {}
    for key in keys:
        if key not in spelled:
            raise ConfigError(
                f"{key!r} is no part of a LoRA for {model!r}: LAYER.lora_A.weight, LAYER.lora_B.weight or LAYER.alpha, where a LAYER is one of "
                f"{patterns(layers)}; leave out the rest, or fuse it into the model's weights"
            )
        layer, part = spelled[key]
        if part in found.setdefault(layer, {}):
            raise ConfigError(f"{key!r} and {found[layer][part]!r} are one and the same; leave one out")
        found[layer][part] = key
    for layer, parts in found.items():
        if not {"down", "up"} <= parts.keys():
            raise ConfigError(f"layer {layer!r} has {', '.join(parts.values())} alone; a pair is A and B, so add the other or leave the layer out")
    if not found:
        raise ConfigError(f"there is no pair of matrices in it; a LoRA for {model!r} has some for {patterns(layers)}")
    return found


def _config(file: Path, keys: Iterable[str], metadata: Mapping[str, str], given: str | None) -> Mapping[str, Any]:
    """PEFT's configuration as far as it says how to scale; empty where there is none. Raises ConfigError for what it says that is done otherwise here."""
    if CONFIG in metadata:
        config = _parsed(metadata[CONFIG])
    elif any(key.startswith("base_model.model.") for key in keys):
        beside = file.parent / PEFT_FILE
        if given == "" or (given is None and not beside.is_file()):
            raise ConfigError(f"PEFT keeps alpha in {PEFT_FILE}, and there is none beside it; put it there")
        config = _parsed(given or beside.read_bytes())
    else:
        return {}
    if other := [name for name in ("use_dora", "alpha_pattern") if config.get(name)]:
        raise ConfigError(f"it was trained with {', '.join(other)}, which is not done here; train it without, or fuse it into the model's weights")
    if (began := str(config.get("init_lora_weights", ""))).lower().startswith(CHANGE_THE_REST):
        instead = "save it with PEFT's path_initial_model_for_weight_conversion, by which it becomes one for the model as it is"
        raise ConfigError(f"it began with init_lora_weights {began[:40]!r}, which changes the model's own weights as well, and they are not in it; {instead}")
    return config


def _parsed(text: str | bytes) -> dict[str, Any]:
    try:
        config = json.loads(text)
    except RecursionError as error:
        raise ConfigError("its configuration is nested too deeply; PEFT's is a flat table") from error
    named = {name.removeprefix("transformer."): value for name, value in config.items()} if isinstance(config, dict) else {"lora_alpha": None}
    if not isinstance(named.get("lora_alpha", 1), int | float):
        raise ConfigError("its configuration is not PEFT's: a table whose lora_alpha, if there is one, is a number")
    return named


def _pair(opened: Any, keys: Mapping[str, str], layer: Layer, config: Mapping[str, Any]) -> Pair:
    """The two matrices of a layer, copied: what is read lies in the mapped file, and a file that changes must not change what is served.

    Types and shapes are looked at before any number is read.
    """
    for part, key in keys.items():
        allowed = (*DTYPES, *WHOLE) if part == "alpha" else DTYPES
        if (dtype := opened.get_slice(key).get_dtype()) not in allowed:
            raise ConfigError(f"{key!r} holds numbers of type {dtype}; save it as one of {', '.join(allowed)}")
    down, up = (tuple(opened.get_slice(keys[part]).get_shape()) for part in ("down", "up"))
    if len(down) != 2 or down[1] != layer.inputs:
        raise ConfigError(f"{keys['down']!r} is {list(down)}; layer {layer.name!r} takes [rank, {layer.inputs}]")
    rank = down[0]
    if not 1 <= rank <= min(layer.inputs, layer.outputs) or up != (layer.outputs, rank):
        takes = f"[{layer.outputs}, rank] and a rank of 1 to {min(layer.inputs, layer.outputs)}"
        raise ConfigError(f"{keys['up']!r} is {list(up)} beside {keys['down']!r} of {list(down)}; layer {layer.name!r} takes {takes}")
    factor = _alpha(opened, keys, config, rank) / (math.sqrt(rank) if config.get("use_rslora") else rank)
    a, b = (opened.get_tensor(keys[part]).to(torch.float32, copy=True) for part in ("down", "up"))
    for part, matrix in (("down", a), ("up", b * factor)):
        if not bool(torch.isfinite(matrix).all()):
            raise ConfigError(f"{keys[part]!r} holds numbers that are not finite; its training went wrong")
    return a, b * factor


def _alpha(opened: Any, keys: Mapping[str, str], config: Mapping[str, Any], rank: int) -> float:
    """The file's own for the layer, else the configuration's, else the rank, as the field has it."""
    if "alpha" not in keys:
        return float(config.get("lora_alpha", rank))
    alpha = opened.get_tensor(keys["alpha"])
    if alpha.numel() != 1:
        raise ConfigError(f"{keys['alpha']!r} has {alpha.numel()} numbers; an alpha is one")
    return float(alpha)


def check_rank(ranks: Mapping[str, int], layout: Layout) -> None:
    """ranks: by name of an adapter. Raises ConfigError where their sum is more than the program takes."""
    total = sum(ranks.values())
    if total > layout.rank:
        each = " + ".join(f"{rank} of {name!r}" for name, rank in ranks.items())
        raise ConfigError(f"rank {each}, where this bundle takes {layout.rank}; use fewer, or compile with --lora-rank {total}")


def pack(layout: Layout, blend: Blend) -> Tensor:
    """[1, N]: the adapters side by side along the rank, strengths in `up`, zeros behind them. Their ranks were checked."""
    packed = torch.zeros(1, layout.numbers)
    used = dict.fromkeys((layer.name for layer in layout.layers), 0)
    places = dict(zip(used, layout.pairs(packed), strict=True))
    for adapter, strength in blend:
        for name, (a, b) in adapter.pairs.items():
            down, up = places[name]
            ranks = slice(used[name], used[name] + len(a))
            down[0, :, ranks] = a.T
            up[0, ranks] = strength * b.T
            used[name] = ranks.stop
    return packed


@torch.no_grad()
def fuse(linears: Mapping[str, Linear], blend: Blend) -> None:
    """Add the adapters to the weights of layers by name, in place; the sum is float64 and rounded once. Raises ConfigError for weights that are not there."""
    changes = [(linears[name].weight, strength, pair) for adapter, strength in blend for name, pair in adapter.pairs.items()]
    if any(weight.is_meta for weight, *_ in changes):
        raise ConfigError("a LoRA cannot be fused into a model without weights; compile it without --lora")
    sums: dict[Tensor, Tensor] = {}
    for weight, strength, (a, b) in changes:
        sums[weight] = sums.get(weight, weight.double()) + strength * b.double() @ a.double()
    names = {layer.weight: name for name, layer in linears.items()}
    fused = {weight: total.to(weight.dtype) for weight, total in sums.items()}
    for weight, total in fused.items():  # all of them before the first is changed
        if not total.isfinite().all():
            text = f"with the LoRAs fused, {names[weight]} holds numbers that {str(weight.dtype).removeprefix('torch.')} does not"
            raise ConfigError(f"{text}; look at the files, or give them a smaller strength")
    for weight, total in fused.items():
        weight.copy_(total)
