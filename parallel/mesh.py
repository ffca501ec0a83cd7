"""A mesh: devices on named axes. `cfg` guidance branches, `cp` parts of the sequence, `tp` parts of heads and FFNs.

rank = (cfg * CP + cp) * TP + tp, and cp = ring * ULYSSES + ulysses: neighbours, which have the fastest links, share what talks most.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Literal

from reelstep.errors import ConfigError, unknown

Axis = Literal["cfg", "cp", "tp", "ring", "ulysses"]
"""`ring` and `ulysses` are the two factors of `cp`."""

GIVEN = ("cfg", "cp", "tp", "ring")
MOST_RANKS = 1 << 16
LINES: tuple[Axis, ...] = ("cfg", "cp", "tp", "ring", "ulysses")


@dataclass(frozen=True)
class Mesh:
    """Ranks by axis. `ring`: how many ring stages `cp` has; the other factor of it exchanges heads for sequence (Ulysses).

    Raises ConfigError for a size below 1, more than `MOST_RANKS` in all, and where ring does not divide cp.
    """

    cfg: int
    cp: int
    tp: int
    ring: int

    def __post_init__(self) -> None:
        for axis in GIVEN:
            if getattr(self, axis) < 1:
                raise ConfigError(f"mesh axis {axis}={getattr(self, axis)}; every axis has at least 1 rank")
        if self.world > MOST_RANKS:
            raise ConfigError(f"a mesh of cfg {self.cfg} x cp {self.cp} x tp {self.tp} ranks; it has at most {MOST_RANKS:,}")
        if self.cp % self.ring:
            raise ConfigError(f"ring={self.ring} does not divide cp={self.cp}; take one of {', '.join(str(n) for n in divisors(self.cp))}")

    @classmethod
    def parse(cls, text: str) -> Mesh:
        """A mesh from "cp=4,tp=2" or "cp=4,ring=2"; axes that are not named have 1 rank, and an empty text is one device.

        Raises ConfigError for what is not `axis=number` or is named twice, NotFound for an unknown axis.
        """
        sizes: dict[str, int] = {}
        for item in filter(None, (part.strip() for part in text.split(","))):
            axis, equals, number = item.partition("=")
            if not equals or not number.strip().isdecimal():
                raise ConfigError(f"mesh {text!r}: {item!r} is not axis=number, as in cp=4,tp=2")
            if axis.strip() not in GIVEN:
                raise unknown("mesh axis", axis.strip(), GIVEN)
            if axis.strip() in sizes:
                raise ConfigError(f"mesh {text!r} names {axis.strip()} twice")
            sizes[axis.strip()] = int(number)
        return cls(**{axis: sizes.get(axis, 1) for axis in GIVEN})

    def __str__(self) -> str:
        return in_words(self.axes)

    @property
    def axes(self) -> Mapping[str, int]:
        """Those of more than one rank, with their sizes: none for one device."""
        return {axis: size for axis in GIVEN if (size := getattr(self, axis)) > 1}

    @property
    def world(self) -> int:
        return self.cfg * self.cp * self.tp

    @property
    def ulysses(self) -> int:
        return self.cp // self.ring

    def size(self, axis: Axis) -> int:
        """Ranks along an axis."""
        found: int = getattr(self, axis)
        return found

    def check_world(self, world: int) -> None:
        """Raises ConfigError unless the mesh has as many ranks as there are processes."""
        if world != self.world:
            raise ConfigError(f"mesh {self} has cfg {self.cfg} x cp {self.cp} x tp {self.tp} = {self.world} ranks, and {world} processes are there")

    def coordinates(self, rank: int) -> Mapping[Axis, int]:
        """Where a rank is on every axis. Raises ConfigError for a rank outside the mesh."""
        if not 0 <= rank < self.world:
            raise ConfigError(f"rank {rank} is not in mesh {self}, whose ranks are 0 to {self.world - 1}")
        rest, tp = divmod(rank, self.tp)
        cfg, cp = divmod(rest, self.cp)
        ring, ulysses = divmod(cp, self.ulysses)
        return {"cfg": cfg, "cp": cp, "tp": tp, "ring": ring, "ulysses": ulysses}

    def rank(self, cfg: int, cp: int, tp: int) -> int:
        """The rank at these coordinates. Raises ConfigError for one outside the mesh."""
        for axis, place in (("cfg", cfg), ("cp", cp), ("tp", tp)):
            if not 0 <= place < getattr(self, axis):
                raise ConfigError(f"{axis} coordinate {place} is not in mesh {self}, where it is 0 to {getattr(self, axis) - 1}")
        return (cfg * self.cp + cp) * self.tp + tp

    def lines(self, axis: Axis) -> tuple[tuple[int, ...], ...]:
        """The groups of ranks that differ along this axis alone, each in the order of the axis."""
        parts: tuple[Axis, ...] = ("cfg", "ring", "ulysses", "tp")
        fixed = [name for name in parts if name != axis and not (axis == "cp" and name in ("ring", "ulysses"))]
        groups: dict[tuple[int, ...], list[int]] = {}
        for rank in range(self.world):
            at = self.coordinates(rank)
            groups.setdefault(tuple(at[name] for name in fixed), []).append(rank)
        return tuple(tuple(group) for group in groups.values())


def in_words(axes: Mapping[str, int]) -> str:
    """As `--mesh` takes them; one device needs none."""
    return ",".join(f"{axis}={axes[axis]}" for axis in GIVEN if axis in axes) or "one device"


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def shares(total: int, parts: int, what: str) -> tuple[int, ...]:
    """`total` things over `parts` ranks as evenly as whole things go, the larger shares first.

    Raises ConfigError, naming `what`, if there is not one for every rank.
    """
    if total < parts:
        raise ConfigError(f"{total} {what} cannot be split over {parts} ranks, at least 1 for each; use at most {total} ranks there")
    return spread(total, parts)


def spread(total: int, parts: int) -> tuple[int, ...]:
    """The same, where a rank may have none."""
    whole, extra = divmod(total, parts)
    return tuple(whole + (i < extra) for i in range(parts))


def bounds(sizes: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """First and one-past-last index of each share."""
    return tuple(pairwise(accumulate(sizes, initial=0)))
