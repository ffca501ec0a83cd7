"""The table of solvers, one file each. A registered solver is tested against its declared order with no test edited."""

from __future__ import annotations

from reelstep.engine.samplers.fold import Solver
from reelstep.registry import Registry

SOLVERS: Registry[Solver] = Registry(
    "solver",
    {
        "euler": "reelstep.engine.samplers.tables.euler:SOLVER",
        "midpoint": "reelstep.engine.samplers.tables.midpoint:SOLVER",
        "heun": "reelstep.engine.samplers.tables.heun:SOLVER",
        "ab2": "reelstep.engine.samplers.tables.ab2:SOLVER",
        "ddim": "reelstep.engine.samplers.tables.ddim:SOLVER",
        "dpmpp_2m": "reelstep.engine.samplers.tables.dpmpp_2m:SOLVER",
    },
)
