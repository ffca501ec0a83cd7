"""The plans that were read and agreed on: the text of each, made anew without the SKU, and the command that writes them.

`python -P -m reelstep.tests.golden.plans [MODEL ...]` rewrites those that differ, of all models or of these; read the difference before it is kept.
A plan of the CPU leaves out which CPU it was made on. One of a mesh is of what its ranks share; what they run whole is in the plan for one device. One
for a backend that keeps ops of ours is that of the bundle which `reelstep compile` writes.
"""

from __future__ import annotations

import argparse
import difflib
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from functools import cache
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory

from reelstep.__main__ import main
from reelstep.compiler.bundle import Bundle
from reelstep.compiler.compile import capture_all, choose_precision, make_plan
from reelstep.compiler.plan import ProgramPlan, RankPlan
from reelstep.compiler.program import Precision
from reelstep.compiler.sharded import plan_ranks
from reelstep.compiler.skus import SKUS
from reelstep.engine.build import sharded_parts
from reelstep.engine.models import MODELS
from reelstep.errors import unknown
from reelstep.parallel.mesh import Mesh

HERE = Path(__file__).parent
COMMAND = "python -P -m reelstep.tests.golden.plans"


@dataclass(frozen=True)
class Golden:
    """One plan. mesh: as `--mesh` takes it; empty for one device. backend: what it is made for, null for all that keep no op of ours."""

    model: str
    sku: str
    mesh: str = ""
    backend: str = "null"

    @property
    def path(self) -> Path:
        return HERE / f"{self}.txt"

    def __str__(self) -> str:
        return f"{self.model}.{self.sku}.{Mesh.parse(self.mesh).world}{'' if self.backend == 'null' else f'.{self.backend}'}"


LARGE = "movie-gen-30b"
BEST_OF_EIGHT = "cfg=2,cp=4,ring=4"
"""What `reelstep plan movie-gen-30b --gpus 8` ranks first for h200-sxm, and for b200."""
KEPT = tuple(Golden(model, "h100-sxm", backend="inductor") for model in ("reel-tiny", "dit-mid"))
"""Graphs with our kernels in them."""
GOLDEN = (
    *(Golden(model, "cpu") for model in MODELS),
    *KEPT,
    *(Golden(LARGE, sku, mesh) for sku in ("h200-sxm", "b200") for mesh in ("", BEST_OF_EIGHT)),
)


@cache
def drafts(model: str) -> tuple[ProgramPlan, ...]:
    """What does not depend on the SKU, traced once."""
    spec = MODELS[model]
    return capture_all(spec.programs(spec.build()))[1]


@cache
def ranks(model: str, mesh: str, precision: Precision) -> tuple[RankPlan, ...]:
    return plan_ranks(sharded_parts(MODELS[model]), Mesh.parse(mesh), precision)


def compiled_text(golden: Golden) -> str:
    """By the command line."""
    with TemporaryDirectory() as folder, redirect_stdout(StringIO()), redirect_stderr(StringIO()) as told:
        out = Path(folder) / "golden.reel"
        code = main(["compile", golden.model, "--sku", golden.sku, "--backend", golden.backend, "--portable", "--cache", folder, "-o", str(out)])
        assert code == 0, told.getvalue()
        return Bundle.open(out).plan.explain()


def plan_text(golden: Golden) -> str:
    if golden in KEPT:
        return compiled_text(golden)
    spec, sku = MODELS[golden.model], SKUS[golden.sku]
    precision, reason = choose_precision("null", sku, None)
    made_for = replace(sku, arch="any") if sku.name == "cpu" else sku
    whole = () if golden.mesh else drafts(golden.model)
    plan = make_plan(spec.name, spec.version, golden.backend, made_for, precision, reason, whole)
    if golden.mesh:
        plan = replace(plan, mesh=Mesh.parse(golden.mesh).axes, ranks=ranks(golden.model, golden.mesh, precision))
    return plan.explain()


def difference(golden: Golden, found: str) -> str:
    """A unified diff from the file to `found`, with what to do; empty if there is none."""
    kept = golden.path.read_text() if golden.path.exists() else ""
    lines = difflib.unified_diff(kept.splitlines(True), found.splitlines(True), f"tests/golden/{golden.path.name}", "made now", n=0)
    text = "".join(lines)
    return f"{text}If that is what you meant, `{COMMAND} {golden.model}` rewrites it\n" if text else ""


if __name__ == "__main__":
    models = sorted({golden.model for golden in GOLDEN})
    parser = argparse.ArgumentParser(prog=COMMAND, description="Write the plans anew and show what changed.")
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"whose (default: all): {', '.join(models)}")
    asked = parser.parse_args().models
    if wrong := sorted({*asked} - {*models}):
        parser.error(str(unknown("model", wrong[0], models)))
    for golden in GOLDEN:
        if golden.model in asked or not asked:
            text = plan_text(golden)
            print(difference(golden, text) or f"{golden} is as it was\n", end="")
            golden.path.write_text(text)
