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
        "rk4": "reelstep.engine.samplers.tables.rk4:SOLVER",
        "ab2": "reelstep.engine.samplers.tables.ab2:SOLVER",
        "ddim": "reelstep.engine.samplers.tables.ddim:SOLVER",
        "dpmpp_2m": "reelstep.engine.samplers.tables.dpmpp_2m:SOLVER",
        "unipc": "reelstep.engine.samplers.tables.unipc:SOLVER",
        "deis": "reelstep.engine.samplers.tables.deis:SOLVER",
        "euler_ancestral": "reelstep.engine.samplers.tables.euler_ancestral:SOLVER",
        "dpmpp_2m_sde": "reelstep.engine.samplers.tables.dpmpp_2m_sde:SOLVER",
        "lcm": "reelstep.engine.samplers.tables.lcm:SOLVER",
        "tcd": "reelstep.engine.samplers.tables.tcd:SOLVER",
    },
)
