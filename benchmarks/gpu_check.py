"""Does an NVIDIA GPU compute what the formulas say, and how near does it come to what it can do?

Correctness of every kernel; the rates of a copy and of a matrix product as measured, and each kernel's, attention's, a block's and a rank's share of them
at Movie Gen 30B's shapes; reel-tiny from words to video beside the CPU. Nothing is installed and nothing is fetched; each part has its own time, and one
that fails is written down and leaves the others alone. Exit code 1: something was computed wrongly; 2: there is no GPU.

L tokens, D width, N heads, K head dim, one latent video (B = 1) unless a shape says otherwise.
"""

from __future__ import annotations

import gc
import math
import os
import re
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from itertools import zip_longest
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from timeit import timeit
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from reelstep.benchmarks.harness import conditions, parser, save, show
from reelstep.compiler.cost import module_flops
from reelstep.compiler.skus import sku_of_device
from reelstep.engine.models.movie_gen import CONFIG_30B, TEXT_TOKENS_30B, Block, MovieGenConfig, MovieGenTransformer
from reelstep.errors import NotFound
from reelstep.kernels import OPS
from reelstep.kernels.attention_choice import ATTENTIONS
from reelstep.kernels.jit import HAS_TRITON, interpreted
from reelstep.kernels.op import Op, tensors_of
from reelstep.kernels.qk_norm_rope import rotary_3d

COPY_AIM, ATTENTION_AIM, BLOCK_AIM = 0.85, 0.65, 0.60
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HALF_ATTENTION = 0.02
"""Relative error allowed to attention in half precision over many keys: a few roundings of 2**-8 of its probabilities and values."""
FP8_PRODUCT = 0.045
"""Relative error allowed to a product of two E4M3 matrices: each rounds by 2**-4 at most and by 0.026 on average, and the two are independent. One of
matrices that were cut off in place of rounded has 0.057."""
E4M3_TIES = 0.01
"""Of the numbers in E4M3 that may be the neighbour of the right one: those that lie between two, and fall to the other side by a rounding in float32."""
E4M3_FROM = (8, 9)
"""The compute capability that products in E4M3 need."""
FROM_HALVES = 2**-15
"""What torch's own attentions may be off by in lse, relative to the largest, for inputs of half precision: the one on a CPU is by 2**-17."""
STEPS = 6
BETWEEN = 512 * 2**20
"""Bytes of what is filled between timed calls: more than any GPU's cache, and longer to write than a call takes to launch."""


@dataclass(frozen=True)
class Sizes:
    """What is timed."""

    config: MovieGenConfig
    latent: tuple[int, int, int]  # F, H, W
    text: int
    matmul: int  # side of the square product whose rate is the ceiling
    ranks: int  # of a split in tokens, and of one in heads and feed-forward width
    clips: int  # latents at once in what works on latents: one fits a GPU's cache, whose rate is not the memory's

    @property
    def tokens(self) -> int:
        return self.config.tokens(*self.latent)

    @property
    def head(self) -> int:
        return self.config.width // self.config.heads


LARGE = Sizes(CONFIG_30B, (32, 96, 96), TEXT_TOKENS_30B, 8192, 8, 32)


@dataclass(frozen=True)
class Finding:
    """One row. right: of a check of values, whether it held; None where nothing was checked. share: of the ceiling that `note` or the part names."""

    what: str
    seconds: float | None = None
    rate: float | None = None
    unit: str = ""
    share: float | None = None
    aim: float | None = None
    error: float | None = None
    allowed: float | None = None
    right: bool | None = None
    note: str = ""


FAILED = "failed"
"""How a row's `what` ends where something was not found."""


def tried(what: str, find: Callable[[], Finding], right: bool | None = None) -> Finding:
    """A finding, or the row that says why there is none, so that others are found after it. right: of that row."""
    try:
        return find()
    except Exception as error:  # noqa: BLE001  # whatever it is, it is written down
        return Finding(f"{what} {FAILED}", right=right, note=in_a_line(error))


def in_a_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip()[:400]}"


def checked(what: str, error: float, allowed: float, seconds: float | None = None, note: str = "") -> Finding:
    """NaN is wrong too."""
    return Finding(what, seconds, error=error, allowed=allowed, right=error <= allowed, note=note)


class Bench:
    """A device, what is timed on it, and the ceilings that were measured there: None until they are."""

    def __init__(self, device: torch.device, sizes: Sizes) -> None:
        self.device, self.sizes = device, sizes
        self.copy_bytes_per_s: float | None = None
        self.matmul_flops_per_s: float | None = None
        self.generator = torch.Generator(device).manual_seed(0)

    @cached_property
    def between(self) -> Tensor:
        """What is filled between timed calls."""
        return torch.empty(BETWEEN, dtype=torch.int8, device=self.device)

    def randn(self, *sizes: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(sizes, generator=self.generator, device=self.device, dtype=dtype)

    def seconds(self, run: Callable[[], object], most_s: float = 0.6, warmup: int = 2) -> float:
        """Median of one call, of 2 to 50 within about `most_s`."""
        for _ in range(warmup):
            run()
        self.wait()
        (first,) = self.each(run, 1)
        return statistics.median(self.each(run, max(2, min(50, int(most_s / first)))))

    def each(self, run: Callable[[], object], count: int) -> list[float]:
        """Seconds of `count` calls. On a GPU what it computes alone: between calls it fills a buffer, so that it never waits for a launch, and reads nothing
        that the last call left in its cache.
        """
        if self.device.type != "cuda":
            return [timeit(run, number=1) for _ in range(count)]
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
        for first, last in events:
            self.between.zero_()
            first.record()
            run()
            last.record()
        self.wait()
        return [float(first.elapsed_time(last)) / 1000 for first, last in events]

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def moved(self, what: str, seconds: float, bytes_: float, aim: float | None = COPY_AIM, note: str = "") -> Finding:
        """Bound by memory: GB/s and the share of the copy's."""
        rate = bytes_ / seconds
        return Finding(what, seconds, rate / 1e9, "GB/s", self.copy_bytes_per_s and rate / self.copy_bytes_per_s, aim, note=note)

    def computed(self, what: str, seconds: float, flops: float, aim: float | None = None, note: str = "") -> Finding:
        """Bound by products: TFLOP/s and the share of the large product's."""
        rate = flops / seconds
        return Finding(what, seconds, rate / 1e12, "TFLOP/s", self.matmul_flops_per_s and rate / self.matmul_flops_per_s, aim, note=note)


def doubled(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """With tensors of floating numbers in float64."""
    found: tuple[Any, ...] = pytree.tree_map(lambda x: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x, arguments)
    return found


def relative(found: Tensor, truth: Tensor) -> float:
    """Of the norms, in float64."""
    truth = truth.double()
    return float((found.double().to(truth.device) - truth).norm() / truth.norm())


def largest_error(found: Tensor, truth: Tensor) -> float:
    """Infinities must agree and then differ by nothing."""
    found, truth = found.double(), truth.double()
    return float(torch.where(found == truth, 0.0, (found - truth).abs()).amax()) if truth.numel() else 0.0


def error_and_bound(found: Any, formula: Any, truth: Any, float32: float) -> tuple[float, float]:
    """Of the output that is nearest to its bound: twice the formula's own error against float64, and one rounding; `float32` of the largest value there.

    One in E4M3, where a rounding of the largest would hide all others, counts in numbers of the type: how far the furthest is off, and how many are.
    """
    pairs = []
    for one, like, exact in zip_longest(tensors_of(found), tensors_of(formula), tensors_of(truth)):
        if (one.shape, one.dtype) != (like.shape, like.dtype):
            return math.inf, 0.0
        if one.dtype == torch.float8_e4m3fn:
            mine, right = ordinal(one), ordinal(exact)
            pairs += [(largest_error(mine, right), 1.0), (float((mine != right).sum()), max(1.0, E4M3_TIES * mine.numel()))]
            continue
        finite = exact.double()[exact.double().isfinite()]
        step = float32 if one.dtype == torch.float32 else torch.finfo(one.dtype).eps
        bound = 2 * largest_error(like, exact) + step * (float(finite.abs().amax()) if finite.numel() else 0.0)
        pairs.append((largest_error(one, exact), bound))
    return worst(pairs)


def ordinal(x: Tensor) -> Tensor:
    """Numbers in E4M3 counted from 0, the next larger one being one more."""
    bits = x.view(torch.int8).int()
    return torch.where(bits < 0, -(bits & 0x7F), bits)


def worst(pairs: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """The error that is the most times its bound; NaN before all, and what is exact, or has no values, after all."""

    def times(pair: tuple[float, float]) -> float:
        error, bound = pair
        return math.inf if math.isnan(error) else error / bound if bound else math.inf if error else -1.0

    return max(pairs, key=times)


def correctness(bench: Bench) -> Iterator[Finding]:
    """Every op over its own examples, each in a process of its own: nearly all the time is Triton's, which compiles a kernel for each shape.

    Attention first, since it tries its tiles on every shape.
    """
    asked = [(name, dtype, bench.device) for name in sorted(OPS, key=lambda name: name != "attention") for dtype in DTYPES]
    with get_context("spawn").Pool(min(len(asked), len(os.sched_getaffinity(0)))) as pool:
        yield from pool.imap(_check_op, asked)


def _check_op(asked: tuple[str, torch.dtype, torch.device]) -> Finding:
    name, dtype, device = asked
    torch.set_num_threads(1)
    with torch.inference_mode():
        return tried(in_dtype(name, dtype), lambda: check_op(OPS[name], dtype, Bench(device, LARGE)), right=False)


def in_dtype(name: str, dtype: torch.dtype) -> str:
    return f"{name} {str(dtype).removeprefix('torch.')}"


def check_op(op: Op, dtype: torch.dtype, bench: Bench) -> Finding:
    """The kernel where one can run here, else what the op runs instead."""
    here = HAS_TRITON and (bench.device.type == "cuda" or interpreted(op.kernels(90)[0].function))

    def make(*sizes: int, dtype: torch.dtype | None = dtype) -> Tensor:
        return torch.randn(sizes, generator=bench.generator, device=bench.device).to(dtype)

    pairs = []
    for arguments in op.examples(make):
        found = op.launch(*arguments) if here else op.overload(*arguments)
        float32 = 4 * torch.finfo(torch.float32).eps if here else FROM_HALVES
        pairs.append(error_and_bound(found, op.reference(*arguments), op.reference(*doubled(arguments)), float32))
    error, allowed = worst(pairs)
    return checked(in_dtype(op.name, dtype), error, allowed, note="kernel" if here else "no Triton kernel here: what the op runs")


def ceilings(bench: Bench) -> Iterator[Finding]:
    """What shares are of."""
    x = bench.randn(bench.sizes.tokens, bench.sizes.config.width)
    y = torch.empty_like(x)
    seconds = bench.seconds(lambda: y.copy_(x))
    bench.copy_bytes_per_s = 2 * x.nbytes / seconds
    yield bench.moved(f"copy of {x.nbytes / 1e6:.0f} MB", seconds, 2 * x.nbytes, None)
    n = bench.sizes.matmul
    a, b = bench.randn(n, n), bench.randn(n, n)
    seconds = bench.seconds(lambda: a @ b)
    bench.matmul_flops_per_s = 2 * n**3 / seconds
    yield bench.computed(f"bfloat16 product of side {n}", seconds, 2 * n**3, note=peak_note(bench))


def peak_note(bench: Bench) -> str:
    """The measured rates beside a data sheet's, where the device is in the table."""
    if bench.device.type != "cuda" or bench.copy_bytes_per_s is None or bench.matmul_flops_per_s is None:
        return ""
    try:
        sku = sku_of_device(torch.cuda.get_device_name(bench.device))
    except NotFound:
        return "no data sheet of this device in the table of SKUs"
    memory = "" if sku.bandwidth_bytes_per_s is None else f"{bench.copy_bytes_per_s / sku.bandwidth_bytes_per_s:.1%} of the bandwidth and "
    return f"{memory}{bench.matmul_flops_per_s / sku.peak_flops['bfloat16']:.1%} of the bfloat16 peak of {sku.name}'s data sheet"


def memory_bound(bench: Bench) -> Iterator[Finding]:
    """Bytes: each argument read once, each output written once."""

    def measured(name: str, arguments: tuple[Any, ...], note: str) -> Finding:
        op = OPS[name].overload
        bytes_ = sum(x.nbytes for x in (*tensors_of(arguments), *tensors_of(op(*arguments))))
        return bench.moved(name, bench.seconds(partial(op, *arguments)), bytes_, note=note)

    for example in large_examples(bench):
        yield tried(example[0], partial(measured, *example))


def large_examples(bench: Bench) -> Iterator[tuple[str, tuple[Any, ...], str]]:
    """Every op but attention, with arguments at the model's shapes, made one op at a time."""
    sizes, randn = bench.sizes, bench.randn
    config, length, d, k = sizes.config, sizes.tokens, sizes.config.width, sizes.head
    (f, h, w), patch = sizes.latent, list(config.patch)
    grid = [size // p for size, p in zip(sizes.latent, patch, strict=True)]
    tokens = f"[1, {length}, {d}]"
    yield "rms_modulate", (randn(1, length, d), randn(1, d), randn(1, d), randn(d), 1e-6, False), tokens
    yield "gated_residual", (randn(1, length, d), randn(1, d), randn(1, length, d)), tokens
    turn = tuple(x.to(bench.device) for x in rotary_3d((grid[0], grid[1], grid[2]), k))
    heads = (1, length, config.heads, k)
    yield "qk_norm_rope", (randn(*heads), randn(*heads), randn(k), randn(k), *turn, 1e-6), str(list(heads))
    yield "swiglu", (randn(1, length, config.ffn), randn(1, length, config.ffn)), f"[1, {length}, {config.ffn}]"
    yield "gelu_tanh", (randn(1, length, config.ffn),), f"[1, {length}, {config.ffn}]"
    yield "fp8_norm_quantise", (randn(1, length, d), randn(1, d), randn(1, d), randn(d), 1e-6, False), tokens
    parts = [part for _ in range(2) for part in (randn(1, config.heads, length, k), randn(1, config.heads, length, dtype=torch.float32))]
    yield "lse_merge", tuple(parts), f"[1, {config.heads}, {length}, {k}]"
    latent = (sizes.clips, config.latent_channels, f, h, w)
    yield "patchify", (randn(*latent), patch, False), str(list(latent))
    values = config.latent_channels * math.prod(patch)
    yield "unpatchify", (randn(sizes.clips, length, values), grid, patch, False), f"[{sizes.clips}, {length}, {values}]"
    x = [randn(*latent, dtype=torch.float32) for _ in range(6)]
    yield "solver_step", (x[0], x[1], x[2], x[3:], 7.5, 0.5, [0.1, -0.2, 0.3, 0.4]), f"{list(latent)}, float32"


def attention_rates(bench: Bench) -> Iterator[Finding]:
    """Self-attention of one block by every implementation, its first queries against float32."""
    sizes = bench.sizes
    q, k, v = (bench.randn(1, sizes.tokens, sizes.config.heads, sizes.head).transpose(1, 2) for _ in range(3))
    scale, flops, few = sizes.head**-0.5, 4 * sizes.tokens**2 * sizes.config.width, min(32, sizes.tokens)
    truth, _ = ATTENTIONS["reference"].run(q[:, :, :few].float(), k.float(), v.float(), None, scale)
    runs: dict[str, Callable[[], Tensor]] = {"torch scaled_dot_product_attention": lambda: F.scaled_dot_product_attention(q, k, v)}
    for name in ATTENTIONS:
        if why := "its scores would not fit the memory" if name == "reference" else ATTENTIONS[name].refuses(q, None):
            yield Finding(f"attention {name}", note=f"not run: {why}")
        else:
            runs[f"attention {name}"] = lambda run=ATTENTIONS[name].run: run(q, k, v, None, scale)[0]  # type: ignore[misc]

    def measured(name: str, run: Callable[[], Tensor]) -> Finding:
        error = relative(run()[:, :, :few], truth)
        row = bench.computed(name, bench.seconds(run, 2.0, warmup=1), flops, ATTENTION_AIM, f"{list(q.shape)}")
        return replace(row, error=error, allowed=HALF_ATTENTION, right=error <= HALF_ATTENTION)

    for named in runs.items():
        yield tried(named[0], partial(measured, *named))


def fp8_layers(bench: Bench) -> Iterator[Finding]:
    """The layers of a block in E4M3, as a quantised engine has them, beside bfloat16 ones; the norm that quantises is in neither time."""
    from reelstep.compiler.passes.quantise import e4m3_linear, quantise_weight  # here: the passes take a while to import

    if why := without_e4m3(bench):
        yield Finding("E4M3 linear layers", note=why)
        return
    d, ffn, length = bench.sizes.config.width, bench.sizes.config.ffn, bench.sizes.tokens
    quantise = OPS["fp8_norm_quantise"].overload
    for inner, outer in ((d, d), (d, ffn), (ffn, d)):
        x, w = bench.randn(1, length, inner), bench.randn(outer, inner) / math.sqrt(inner)
        rows, (values, steps) = quantise(x, None, None, None, 1e-6, False), quantise_weight(w, "fp8")
        scaled = partial(e4m3_linear, rows, values, steps, torch.bfloat16)
        dense = F.rms_norm(x[0].float(), (inner,), None, 1e-6).to(x.dtype)
        few, flops = min(256, length), 2 * length * inner * outer
        error = relative(scaled()[0, :few], dense[:few].double() @ w.double().t())
        plain = bench.seconds(partial(F.linear, dense, w))
        quick = bench.seconds(scaled)
        yield bench.computed(f"bfloat16 linear {inner} -> {outer}", plain, flops)
        row = bench.computed(f"E4M3 linear {inner} -> {outer}", quick, flops, note=f"{plain / quick:.2f} times as fast as bfloat16")
        yield replace(row, error=error, allowed=FP8_PRODUCT, right=error <= FP8_PRODUCT)


def without_e4m3(bench: Bench) -> str:
    """Why its products do not run here; empty where they do."""
    if bench.device.type != "cuda" or (found := torch.cuda.get_device_capability(bench.device)) >= E4M3_FROM:
        return ""
    return f"not run: products in E4M3 need sm{E4M3_FROM[0]}{E4M3_FROM[1]}, and this is sm{found[0]}{found[1]}"


def on_device(module: nn.Module, bench: Bench) -> nn.Module:
    """A module of the meta device with random weights in bfloat16."""
    module = module.to(torch.bfloat16).to_empty(device=bench.device).eval().requires_grad_(False)
    for weight in (*module.parameters(), *module.buffers()):
        weight.normal_(0.0, 0.02, generator=bench.generator)
    return module


def block_inputs(bench: Bench, meta: bool = False) -> tuple[Tensor, ...]:
    """Of `Block`: tokens, positions, modulation, context."""
    sizes, d = bench.sizes, bench.sizes.config.width
    shapes = ((1, sizes.tokens, d), (sizes.tokens, d), (1, 6, d), (1, sizes.text, d))
    return tuple(torch.empty(shape, device="meta") if meta else bench.randn(*shape) for shape in shapes)


def with_mfu(bench: Bench, row: Finding) -> Finding:
    """The share is of the peak in the device's data sheet, as MFU is; of the measured product where the table has none."""
    try:
        peak = sku_of_device(torch.cuda.get_device_name(bench.device)).peak_flops["bfloat16"] if bench.device.type == "cuda" else None
    except NotFound:
        peak = None
    if peak is None or row.rate is None:
        return replace(row, note=f"share of the measured product; {row.note}")
    of_measured = "" if row.share is None else f", {row.share:.1%} of the measured product"
    return replace(row, share=row.rate * 1e12 / peak, note=f"MFU, of the data sheet's {peak / 1e12:.0f} TFLOP/s{of_measured}; {row.note}")


def one_block(bench: Bench) -> Iterator[Finding]:
    with torch.device("meta"):
        module: nn.Module = Block(bench.sizes.config)
    flops = module_flops(module, *block_inputs(bench, meta=True))
    module, inputs = on_device(module, bench), block_inputs(bench)
    row = bench.computed("one block, op by op", bench.seconds(lambda: module(*inputs), 3.0, warmup=1), flops, BLOCK_AIM, f"{bench.sizes.tokens} tokens")
    yield replace(with_mfu(bench, row), right=bool(module(*inputs).isfinite().all()))


def whole_forward(bench: Bench) -> Iterator[Finding]:
    """All blocks on random weights, once to warm up and once timed; or what is missing for it."""
    sizes, config = bench.sizes, bench.sizes.config
    with torch.device("meta"):
        module: nn.Module = MovieGenTransformer(config)
        inputs = [torch.empty(1, config.latent_channels, *sizes.latent), torch.empty(1, 7, config.width), None, torch.empty(1, sizes.text, config.width)]
    weights = 2 * sum(p.numel() for p in module.parameters())
    need = weights + 2 * sizes.tokens * (3 * config.ffn + 4 * config.width)  # of a block: three tensors of the feed-forward's width, four of the model's
    if bench.device.type == "cuda" and need > (free := torch.cuda.mem_get_info(bench.device)[0]):
        yield Finding("whole forward", note=f"not run: it needs about {need / 1e9:.0f} GB and {free / 1e9:.0f} GB are free")
        return
    flops = module_flops(module, *inputs)  # type: ignore[arg-type]  # a model without condition latents is given None
    module = on_device(module, bench)
    given = [None if x is None else bench.randn(*x.shape) for x in inputs]
    began = time.perf_counter()
    finite = bool(module(*given).isfinite().all())
    first = time.perf_counter() - began
    row = bench.computed("whole forward, op by op", bench.each(lambda: module(*given), 1)[0], flops, note=f"{config.layers} blocks, first call {first:.1f} s")
    yield replace(with_mfu(bench, row), right=finite)


Run = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]


def end_to_end(bench: Bench) -> Iterator[Finding]:
    yield from apart(words_to_video, bench.device)


def apart(find: Callable[[Bench], Iterator[Finding]], device: torch.device) -> Iterator[Finding]:
    """What `find` yields in a process of its own, which the native code of an engine may end. Raises RuntimeError if it does, naming the functions it ended
    in, or if `find` fails.
    """
    context = get_context("spawn")
    found, sent = context.Pipe(duplex=False)
    with TemporaryDirectory() as folder:
        said = Path(folder) / "stderr"
        said.touch()  # it may end before it writes there
        process = context.Process(target=_send, args=(find, device, sent, said), daemon=True)
        process.start()
        sent.close()
        try:
            while (one := found.recv()) is not None:
                if isinstance(one, str):
                    raise RuntimeError(one)
                yield one
        except EOFError:
            process.join()
            code = process.exitcode or 0
            ended = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"
            raise RuntimeError(f"its process {ended}{last_words(said.read_text())}") from None
        finally:
            process.kill()
            process.join()


def _send(find: Callable[[Bench], Iterator[Finding]], device: torch.device, pipe: Connection, said: Path) -> None:
    os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT), sys.stderr.fileno())
    torch._C._set_print_stack_traces_on_fatal_signal(True)
    try:
        with torch.inference_mode():
            for one in find(Bench(device, LARGE)):
                pipe.send(one)
        pipe.send(None)
    except Exception as error:  # noqa: BLE001  # the other process raises it
        pipe.send(f"{type(error).__name__}: {error}")


def last_words(said: str) -> str:
    """Of what torch says of a fatal signal, a paragraph for each thread, the functions of the thread that caught it, the innermost first; and what the
    process had said before.
    """
    signalled = re.search(r"^SIG\w+\(\d+\), PID", said, re.MULTILINE)
    words, threads = (said[: signalled.start()], said[signalled.start() :].split("\n\n")) if signalled else (said, [])
    caught = next((thread for thread in threads if "::fatalSignalHandler" in thread), "")
    frames = re.findall(r"frame #\d+: (.+) \+ 0x\w+ \(0x\w+ in (.+)\)", caught.partition("::fatalSignalHandler")[2])[1:]  # the first calls handlers
    names = [Path(library).name if name == "<unknown function>" else name.replace("(anonymous namespace)::", "").split("(")[0] for name, library in frames]
    lines = [line for line in words.splitlines() if line.strip()]
    return (f" in {' < '.join(names[:12])}" if names else "") + (f"; it said last: {lines[-1]}" if lines else "")


def words_to_video(bench: Bench) -> Iterator[Finding]:
    """reel-tiny from words to video in a few Euler steps: on the CPU, on the device op by op, and with the denoiser compiled by inductor."""
    from reelstep.compiler.capture import capture  # here: these want einops, and the other parts do not
    from reelstep.compiler.passes import apply_passes
    from reelstep.compiler.passes.quantise import linears, quantise
    from reelstep.compiler.program import Program
    from reelstep.compiler.signature import Signature
    from reelstep.engine.models.byte_text import tokenize
    from reelstep.engine.models.reel_tiny import SPEC

    programs = {program.name: program for program in SPEC.programs(SPEC.build())}
    tokens = torch.tensor([tokenize("a red balloon rises", SPEC.settings.text_length)])
    noise = torch.randn((1, 16, 4, 8, 8), generator=torch.Generator().manual_seed(0))

    def plain(name: str, device: torch.device) -> Run:
        program = programs[name]
        module = program.module.to(device)

        def run(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {program.outputs[0].name: module(*(inputs[edge.name].to(device) for edge in program.inputs)).cpu()}

        return run

    def timed(runs: Mapping[str, Run]) -> tuple[Tensor, float]:
        text_to_video(runs, tokens, noise)
        began = time.perf_counter()
        video = text_to_video(runs, tokens, noise)
        return video, time.perf_counter() - began

    truth, seconds = timed({name: plain(name, torch.device("cpu")) for name in programs})
    yield Finding("reel-tiny, CPU, op by op, float32", seconds, note=f"{STEPS} steps; what the others are compared with")
    if bench.device.type == "cpu":
        return
    runs = {name: plain(name, bench.device) for name in programs}
    with exact_float32():
        video, seconds = timed(runs)
    yield checked("reel-tiny, op by op, float32", relative(video, truth), 1e-3, seconds)
    from reelstep.compiler.backends.inductor import InductorBackend  # here: without a C++ compiler what is above still ran

    def denoiser() -> Program:
        """With weights of its own: those above have moved."""
        return next(program for program in SPEC.programs(SPEC.build()) if program.name == "denoise")

    denoise = denoiser()
    profile, backend = denoise.profile("video"), InductorBackend(device=str(bench.device), autotune=False)
    signature = Signature.of(denoise, profile)
    exported, _ = apply_passes(capture(denoise, profile), keep=backend.keeps("sm"))
    in_fp8 = quantise(exported, signature, "fp8", linears(exported).values(), {})
    given = {edge.name: edge.zeros(1, bench.device) for edge in signature.inputs}
    module = denoiser().module.to(bench.device, torch.bfloat16)
    halves = [x.bfloat16() for x in signature.ordered(given)]
    peer = per_call(partial(module, *halves), bench)
    yield Finding("reel-tiny, denoiser's call, op by op, bfloat16", peer)

    def beside(what: str, seconds: float) -> Finding:
        return Finding(f"reel-tiny, denoiser's call, {what}", seconds, note=f"{peer / seconds:.1f} times as fast as op by op")

    with TemporaryDirectory() as folder:

        def built_for(dtype: str, cuda_graphs: bool) -> Run:
            graph = {"bfloat16": exported, "E4M3": in_fp8}[dtype]
            return replace(backend, cuda_graphs=cuda_graphs).build(lambda: graph, signature, "bfloat16", Path(folder), dtype)

        for dtype, cuda_graphs in (("bfloat16", False), ("bfloat16", True), ("E4M3", True)):
            if dtype == "E4M3" and (why := without_e4m3(bench)):
                yield Finding("reel-tiny, denoiser by inductor, E4M3", note=why)
                continue
            began = time.perf_counter()
            runs["denoise"] = run = built_for(dtype, cuda_graphs)
            built = time.perf_counter() - began
            video, seconds = timed(runs)
            how = f"by inductor, {dtype}{', CUDA graphs' if cuda_graphs else ''}"
            row = Finding(f"reel-tiny, denoiser {how}", seconds, error=relative(video, truth), note=f"engine ready in {built:.0f} s")
            yield row if dtype == "E4M3" else replace(row, allowed=5e-2, right=row.error is not None and row.error <= 5e-2)
            yield beside(how, per_call(partial(run, given), bench))
    compiled = torch.compile(module, mode="reduce-overhead")
    yield beside("torch.compile, bfloat16, CUDA graphs", per_call(partial(compiled, *halves), bench))


def per_call(run: Callable[[], object], bench: Bench, calls: int = 30) -> float:
    """Seconds until a call has ended, its launches among them: the median."""

    def ended() -> None:
        run()
        bench.wait()

    for _ in range(3):
        ended()
    return statistics.median(timeit(ended, number=1) for _ in range(calls))


@contextmanager
def exact_float32() -> Iterator[None]:
    """Inside, cuDNN does not round float32 to TF32."""
    before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def text_to_video(runs: Mapping[str, Run], tokens: Tensor, noise: Tensor) -> Tensor:
    """[1, 3, frames, height, width], without guidance and without a picture."""
    from reelstep.engine.samplers.ns import drive, sample, start
    from reelstep.engine.samplers.paths import PATHS
    from reelstep.engine.samplers.schedules import SCHEDULES
    from reelstep.engine.samplers.tables import SOLVERS

    context = runs["encode_text"]({"tokens": tokens})["context"]
    table = SOLVERS["euler"].build(SCHEDULES["linear"](STEPS), PATHS["condot"])

    def velocity(x: Tensor, t: float) -> Tensor:
        modulation = runs["embed_time"]({"t": torch.tensor([t], dtype=torch.float32)})["modulation"]
        return runs["denoise"]({"x": x, "modulation": modulation, "condition": torch.zeros_like(noise), "context": context})["velocity"]

    return runs["decode"]({"latent": drive(sample(table, start(table, noise)), velocity)})["video"]


@dataclass(frozen=True)
class Piece:
    """Of one rank's block. Bound by products if it has flops, else by memory."""

    what: str
    runs: tuple[Callable[[], object], ...]
    flops: float = 0.0
    bytes_: float = 0.0

    def __call__(self) -> None:
        for run in self.runs:
            run()


def rank_pieces(bench: Bench, cp: int, tp: int) -> Iterator[Piece]:
    """What one rank of a mesh computes of a block: tokens over cp, heads and feed-forward over tp, attention by Ulysses."""
    sizes, config, randn = bench.sizes, bench.sizes.config, bench.randn
    length, d, ffn, k = sizes.tokens // cp, config.width, config.ffn // tp, sizes.head
    mine = d // tp
    layers = [(length, d, mine, 4), (length, mine, d, 2), (sizes.text, d, mine, 2), (length, d, ffn, 2), (length, ffn, d, 1)]
    products: list[Callable[[], object]] = []
    for rows, inner, outer, count in layers:
        x, w = randn(rows, inner), randn(outer, inner)
        products += [partial(F.linear, x, w)] * count
    yield Piece("linear layers", tuple(products), sum(2.0 * rows * inner * outer * count for rows, inner, outer, count in layers))
    own, all_heads = config.heads // (cp * tp), config.heads // tp
    for what, heads, queries, keys in (("self-attention", own, sizes.tokens, sizes.tokens), ("attention to text", all_heads, length, sizes.text)):
        q, kv = randn(1, queries, heads, k).transpose(1, 2), randn(1, keys, heads, k).transpose(1, 2)
        yield Piece(what, (partial(OPS["attention"].overload, q, kv, kv, None, k**-0.5, "auto"),), 4.0 * heads * queries * keys * k)
    x, y, vector, gain = randn(1, length, d), randn(1, length, d), randn(1, d), randn(d)
    a, b = randn(1, length, ffn), randn(1, length, ffn)
    norm = (lambda: OPS["rms_modulate"].overload(x, vector, vector, gain, 1e-6, False),)
    residual, added = (lambda: OPS["gated_residual"].overload(x, vector, y),), (lambda: x + y,)
    middle = (lambda: OPS["swiglu"].overload(a, b),)
    yield Piece("between them", norm * 2 + residual * 2 + added * 2 + middle, bytes_=(2 * 2 + 2 * 3 + 2 * 3) * x.nbytes + 3 * a.nbytes)


def rank_shapes(bench: Bench) -> Iterator[Finding]:
    """Compute of one rank as measured; what ranks send each other is in no number here."""
    for cp, tp in ((bench.sizes.ranks, 1), (1, bench.sizes.ranks)):
        mesh, total = f"cp={cp}" if cp > 1 else f"tp={tp}", 0.0
        for piece in rank_pieces(bench, cp, tp):
            seconds = bench.seconds(piece)
            total += seconds
            what = f"{mesh}, a rank's {piece.what}"
            yield bench.computed(what, seconds, piece.flops) if piece.flops else bench.moved(what, seconds, piece.bytes_, None)
        yield Finding(f"{mesh}, a rank's block", total, note="compute alone: communication was not measured and is left out")


@dataclass(frozen=True)
class Part:
    """budget_s: when it is stopped, with what it has found so far. alone: it uses the device in processes of its own."""

    name: str
    budget_s: float
    find: Callable[[Bench], Iterator[Finding]]
    alone: bool = False


PARTS = (
    Part("ceilings", 5, ceilings),
    Part("kernels", 30, memory_bound),
    Part("attention", 50, attention_rates),
    Part("fp8", 20, fp8_layers),
    Part("block", 30, one_block),
    Part("ranks", 35, rank_shapes),
    Part("correctness", 90, correctness, alone=True),
    Part("forward", 60, whole_forward),
    Part("end to end", 215, end_to_end, alone=True),
)
"""In the order they run: 535 s in all. What shares are of comes first, and what may end its process last."""


AGAIN_S = 30.0
"""After which a part is told once more that its time is up: what is raised while an object is taken apart is lost."""


class Overran(BaseException):
    """A part's time is up: not for what a part runs to catch, and some of that catches every Exception."""


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raises Overran in what runs inside once its time is up; a call into C is left to return first."""

    def stop(*_: Any) -> None:
        raise Overran(f"stopped after its {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds, AGAIN_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run_parts(
    bench: Bench, parts: Sequence[Part], tell: Callable[[str], None] = print, keep: Callable[[list[dict[str, Any]]], None] = lambda rows: None
) -> list[dict[str, Any]]:  # fmt: skip
    """Rows of all parts. What a part raises becomes its last row, and the next part runs, unless the device is lost to this process: then those alone that
    have processes of their own. keep: gets the rows so far after each.
    """
    rows: list[dict[str, Any]] = []
    lost = ""

    def add(part: Part, finding: Finding) -> None:
        rows.append({"part": part.name, **asdict(finding)})
        keep(rows)

    for part in parts:
        began = time.perf_counter()
        if lost and not part.alone:
            add(part, Finding(FAILED, note=f"not run: {lost}"))
            continue
        try:
            with at_most(part.budget_s), torch.inference_mode():
                for finding in part.find(bench):
                    add(part, finding)
        except (Exception, Overran) as error:  # noqa: BLE001  # whatever it is, it is written down, and the other parts run
            add(part, Finding(FAILED, note=in_a_line(error)))
        gc.collect()
        if not lost and (why := fault(bench)):
            lost = f"the device was lost in part {part.name!r}: {why}"
        tell(f"{part.name}: {time.perf_counter() - began:.1f} s")
    return rows


def fault(bench: Bench) -> str:
    """Why this process can use its device no more, after an access that the device refused; empty if it can."""
    if bench.device.type != "cuda":
        return ""
    try:
        torch.cuda.synchronize(bench.device)
        torch.cuda.empty_cache()
    except RuntimeError as error:
        return in_a_line(error)
    return ""


def device_conditions() -> dict[str, Any]:
    """Of the GPU and what drives it."""
    found = torch.cuda.get_device_properties(0)
    packages = {name: _version(name) for name in ("triton", "tensorrt", "torch_tensorrt", "flash_attn_interface")}
    return {
        "gpu": found.name, "compute_capability": f"{found.major}.{found.minor}", "multiprocessors": found.multi_processor_count,
        "memory_gb": found.total_memory / 1e9, "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(), "packages": packages,
    }  # fmt: skip


def _version(module: str) -> str:
    try:
        return version(module)
    except PackageNotFoundError:
        return "of unknown version" if find_spec(module) else "absent"


def wrong(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What was computed wrongly."""
    return [f"{row['part']}: {row['what']}" for row in rows if row["right"] is False]


def unfinished(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Parts of which something failed, so that not all of what they check is known to be right."""
    return list(dict.fromkeys(row["part"] for row in rows if row["what"].endswith(FAILED) and row["right"] is None))


def main(argv: Sequence[str]) -> None:
    options = parser("gpu_check", __doc__ or "")
    options.add_argument("--parts", nargs="+", metavar="PART", choices=[part.name for part in PARTS], help="only these (default: all)")
    args = options.parse_args(argv)
    if not torch.cuda.is_available():
        print(f"gpu_check: torch {torch.__version__} sees no NVIDIA GPU, so there is nothing to check; run it on a machine with one", file=sys.stderr)
        raise SystemExit(2)
    device = torch.device("cuda", 0)
    parts = [part for part in PARTS if args.parts is None or part.name in args.parts]

    def keep(rows: list[dict[str, Any]]) -> None:
        if args.json is not None:
            command = " ".join(["python -P -m reelstep.benchmarks.gpu_check", *argv])
            save("gpu_check", rows, {**conditions(args.seed), **device_conditions(), "command": command}, args.json)

    rows = run_parts(Bench(device, LARGE), parts, keep=keep)
    show("gpu_check", rows, width=190)
    if args.json is not None:
        print(f"wrote {args.json}")
    if found := wrong(rows):
        print(f"gpu_check: {len(found)} wrong: {'; '.join(found)}", file=sys.stderr)
        raise SystemExit(1)
    if ended := unfinished(rows):
        print(f"gpu_check: nothing was found wrong, but not all was checked; these parts failed: {', '.join(ended)}", file=sys.stderr)
        raise SystemExit(3)


if __name__ == "__main__":
    main(sys.argv[1:])
