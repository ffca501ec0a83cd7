"""Where plans, weights and timings lie, so that each is made once.

In the cache directory:
  tensorrt-ENGINE.json        what a program of a bundle is on this machine: a plan, its edges, and the content of each of its weights
  tensorrt-PLAN.plan          named by graph, precision, profile, GPU and versions, and by no weight but integers: variants in weights share it
  tensorrt-weights/SHA256     one weight as the plan wants it (folded, cast), named by its content: plans, profiles, SKUs and variants share it
  tensorrt-MACHINE.timings    what TensorRT measured of its kernels on this GPU
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import tensorrt as trt
import torch
import torch.distributed as dist
import torch_tensorrt
from torch import Tensor

from reelstep.compiler.backends import Graph, Watch
from reelstep.compiler.backends.tensorrt.build import STREAM_ABOVE, build_plan, row_ranges
from reelstep.compiler.backends.tensorrt.engine import Plan, TensorRtExecutable, check_links
from reelstep.compiler.backends.tensorrt.network import Network, convert, lower
from reelstep.compiler.backends.tensorrt.records import Records
from reelstep.compiler.graphs import dump_graph
from reelstep.compiler.plan import canonical_json
from reelstep.compiler.program import Precision
from reelstep.compiler.signature import Signature
from reelstep.compiler.sources import made_of
from reelstep.compiler.storage import seal, sealed, write_file


def build(graph: Graph, signature: Signature, precision: Precision, cache: Path | None, key: str, watch: Watch) -> TensorRtExecutable:
    """The executable of a program, from the cache where it is there. Raises what `Backend.build` says."""
    device = here()
    if cache is None:
        return TensorRtExecutable(_make(graph, signature, precision, None, device, watch), signature, device)
    entry = cache / f"tensorrt-{digest(key, precision, machine(device), place())}.json"
    plan = saved(entry)
    if plan is None:
        plan = _make(graph, signature, precision, cache, device, watch)
        keep(entry, plan)
    return TensorRtExecutable(plan, signature, device)


def here() -> torch.device:
    """The GPU of this process."""
    return torch.device("cuda", torch.cuda.current_device())


def digest(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def machine(device: torch.device) -> str:
    """What a plan is tied to: the SKU by the name its driver gives, its size (a slice of one has less), and the versions."""
    gpu = torch.cuda.get_device_properties(device)
    size = f"sm{gpu.major}{gpu.minor}, {gpu.multi_processor_count} multiprocessors, {gpu.total_memory} bytes"
    return f"{gpu.name}, {size}, TensorRT {trt.__version__}, Torch-TensorRT {torch_tensorrt.__version__}"


def place() -> str:
    """Which rank this is: a rank's graph may be another's, and its network names ranks."""
    return f"rank {dist.get_rank()} of {dist.get_world_size()}" if dist.is_initialized() else "alone"


def plan_key(graph: bytes, signature: Signature, precision: Precision, network: Network, streams: bool, where: str) -> str:
    """Everything a plan depends on, what lowers and builds the graph among it; of weights none but integers and truths, which stay in a stripped plan.

    TensorRT may work them into shapes and indices, and a refit gives only what the plan asks for.
    """
    fixed = [[name, hashlib.sha256(_bytes(weight)).hexdigest()] for name, weight in sorted(network.weights.items()) if not weight.is_floating_point()]
    edges = canonical_json(signature.to_json()).decode()
    rows = canonical_json([list(span) for span in row_ranges(signature.max_batch)]).decode()
    groups, by = json.dumps(network.groups, sort_keys=True), f"torch {torch.__version__}"
    return made_of(hashlib.sha256(graph).hexdigest(), edges, rows, precision, groups, json.dumps(fixed), str(streams), where, by)


def _make(graph: Graph, signature: Signature, precision: Precision, cache: Path | None, device: torch.device, watch: Watch) -> Plan:
    """Convert the graph, and build its plan where the cache has none."""
    exported = graph()
    structure = dump_graph(exported)  # first: lowering changes the graph in place
    with Records() as records:
        network = convert(lower(exported, signature, precision), signature, records)
        collectives = any(len(ranks) > 1 for ranks in network.groups.values())
        if collectives:
            check_links(device)  # before minutes of work
        streams = network.weight_bytes > STREAM_ABOVE * torch.cuda.mem_get_info(device)[1]
        timings = cache and cache / f"tensorrt-{digest(machine(device))}.timings"
        path = cache and cache / f"tensorrt-{plan_key(structure, signature, precision, network, streams, machine(device))}.plan"
        if path is not None and sealed(path):
            data = path.read_bytes()
        else:
            torch.cuda.empty_cache()  # what torch keeps for itself TensorRT cannot try its kernels in
            data = build_plan(network, signature, timings, streams, records, watch)
            if path is not None:
                seal(path, lambda temporary: write_file(temporary, data))
    return Plan(data, network.inputs, network.outputs, network.weights, collectives, path)


def keep(entry: Path, plan: Plan) -> None:
    """Note what an engine is made of, its weights first, so that a note is never without them."""
    assert plan.path is not None
    weights = {name: _keep_weight(tensor, entry.parent) for name, tensor in plan.weights.items()}
    note = {"plan": plan.path.name, "inputs": plan.inputs, "outputs": plan.outputs, "collectives": plan.collectives, "weights": weights}
    seal(entry, lambda temporary: write_file(temporary, canonical_json(note)))


def saved(entry: Path) -> Plan | None:
    """What was kept, with weights mapped from their files; None if anything of it is missing or damaged."""
    if not sealed(entry):
        return None
    note: dict[str, Any] = json.loads(entry.read_bytes())
    path = entry.with_name(note["plan"])
    files = [weight_file(entry.parent, about["sha256"]) for about in note["weights"].values()]
    if not all(map(sealed, {path, *files})):
        return None
    weights = {name: _weight(entry.parent, about) for name, about in note["weights"].items()}
    return Plan(path.read_bytes(), tuple(note["inputs"]), tuple(note["outputs"]), weights, note["collectives"], path)


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def weight_file(folder: Path, content: str) -> Path:
    return folder / "tensorrt-weights" / content


def _keep_weight(tensor: Tensor, folder: Path) -> dict[str, Any]:
    data = _bytes(tensor)
    content = hashlib.sha256(data).hexdigest()
    path = weight_file(folder, content)
    if not sealed(path):
        seal(path, lambda temporary: write_file(temporary, data))
    return {"sha256": content, "dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape)}


def _weight(folder: Path, about: dict[str, Any]) -> Tensor:
    path = weight_file(folder, about["sha256"])
    data = torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)
    return data.view(getattr(torch, about["dtype"])).reshape(about["shape"])
