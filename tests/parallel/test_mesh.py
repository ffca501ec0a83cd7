from __future__ import annotations

from math import prod

import pytest

from reelstep.errors import ConfigError, NotFound
from reelstep.parallel.mesh import LINES, Mesh, bounds, shares


def test_a_mesh_is_read_and_printed() -> None:
    mesh = Mesh.parse(" cp=4, tp=2 ")
    assert mesh == Mesh(cfg=1, cp=4, tp=2, ring=1)
    assert (str(mesh), mesh.world, mesh.ulysses) == ("cp=4,tp=2", 8, 4)
    assert Mesh.parse(str(Mesh(2, 4, 1, 2))) == Mesh(2, 4, 1, 2)
    assert Mesh.parse("").world == 1


@pytest.mark.parametrize(
    ("text", "error", "words"),
    [
        ("cp=99999999999999999999", ConfigError, "a mesh of cfg 1 x cp 99999999999999999999 x tp 1 ranks; it has at most 65,536"),
        ("cfg=256,cp=256,tp=2", ConfigError, "it has at most 65,536"),
        ("cp=0", ConfigError, "at least 1"),
        ("cp=4,ring=3", ConfigError, "ring=3 does not divide cp=4; take one of 1, 2, 4"),
        ("cp4", ConfigError, "'cp4' is not axis=number"),
        ("cp=2,cp=2", ConfigError, "twice"),
        ("dp=2", NotFound, "known: cfg, cp, ring, tp"),
    ],
)
def test_a_mesh_that_cannot_be_is_refused(text: str, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        Mesh.parse(text)


def test_coordinates_and_ranks_are_inverse_and_lines_cover_every_rank_once() -> None:
    mesh = Mesh.parse("cfg=2,cp=6,ring=3,tp=2")
    for rank in range(mesh.world):
        at = mesh.coordinates(rank)
        assert mesh.rank(at["cfg"], at["cp"], at["tp"]) == rank
        assert at["cp"] == at["ring"] * mesh.ulysses + at["ulysses"]
    for axis in LINES:
        lines = mesh.lines(axis)
        assert sorted(rank for line in lines for rank in line) == list(range(mesh.world))
        for line in lines:
            assert [mesh.coordinates(rank)[axis] for rank in line] == list(range(mesh.size(axis)))
    assert prod(mesh.size(axis) for axis in ("cfg", "ring", "ulysses", "tp")) == mesh.world


def test_what_is_outside_a_mesh_is_named() -> None:
    mesh = Mesh.parse("cp=2")
    with pytest.raises(ConfigError, match="rank 2 is not in mesh cp=2, whose ranks are 0 to 1"):
        mesh.coordinates(2)
    with pytest.raises(ConfigError, match="cp coordinate 2"):
        mesh.rank(0, 2, 0)
    with pytest.raises(ConfigError, match="cfg 1 x cp 2 x tp 1 = 2 ranks, and 3 processes"):
        mesh.check_world(3)


def test_shares_are_as_even_as_whole_things_go() -> None:
    assert shares(27, 4, "tokens") == (7, 7, 7, 6)
    assert bounds(shares(27, 4, "tokens")) == ((0, 7), (7, 14), (14, 21), (21, 27))
    with pytest.raises(ConfigError, match="3 heads cannot be split over 4 ranks"):
        shares(3, 4, "heads")
