"""The plans that were read and agreed on: the text of each, made anew by the null backend, and the command that writes them.

`python -P -m reelstep.tests.golden.plans [MODEL ...]` rewrites those that differ, of all models or of these; read the difference before it is kept.
A plan of the CPU leaves out which CPU it was made on.
"""

from __future__ import annotations

import difflib
import sys
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from reelstep.compiler.compile import capture_all, choose_precision, make_plan
from reelstep.compiler.plan import ProgramPlan
from reelstep.compiler.skus import SKUS
from reelstep.engine.models import MODELS

HERE = Path(__file__).parent
COMMAND = "python -P -m reelstep.tests.golden.plans"


@dataclass(frozen=True)
class Golden:
    """One plan. devices: of the mesh; compile_model plans for one device."""

    model: str
    sku: str
    devices: int = 1

    @property
    def path(self) -> Path:
        return HERE / f"{self}.txt"

    def __str__(self) -> str:
        return f"{self.model}.{self.sku}.{self.devices}"


LARGE = "movie-gen-30b"
GOLDEN = (*(Golden(model, "cpu") for model in MODELS), Golden(LARGE, "h200-sxm"), Golden(LARGE, "b200"))


@cache
def drafts(model: str) -> tuple[ProgramPlan, ...]:
    """What does not depend on the SKU, traced once."""
    spec = MODELS[model]
    return capture_all(spec.programs(spec.build()))[1]


def plan_text(golden: Golden) -> str:
    spec, sku = MODELS[golden.model], SKUS[golden.sku]
    precision, reason = choose_precision("null", sku, None)
    made_for = replace(sku, arch="any") if sku.name == "cpu" else sku
    return make_plan(spec.name, spec.version, "null", made_for, precision, reason, drafts(golden.model)).explain()


def difference(golden: Golden, found: str) -> str:
    """A unified diff from the file to `found`, with what to do; empty if there is none."""
    kept = golden.path.read_text() if golden.path.exists() else ""
    lines = difflib.unified_diff(kept.splitlines(True), found.splitlines(True), f"tests/golden/{golden.path.name}", "made now", n=0)
    text = "".join(lines)
    return f"{text}If that is what you meant, `{COMMAND} {golden.model}` rewrites it\n" if text else ""


if __name__ == "__main__":
    for golden in GOLDEN:
        if golden.model in sys.argv[1:] or len(sys.argv) == 1:
            text = plan_text(golden)
            print(difference(golden, text) or f"{golden} is as it was\n", end="")
            golden.path.write_text(text)
