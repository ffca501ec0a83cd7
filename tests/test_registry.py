"""A table resolves its entries when they are asked for, and says what it knows when it is asked for something else."""

from __future__ import annotations

import sys

import pytest

from reelstep.errors import NotFound
from reelstep.registry import Registry

TABLE: Registry[object] = Registry("shape", {"square": "fractions:Fraction", "circle": "no_such_module:Circle", "line": "fractions:NoSuchName"})


def test_an_entry_is_the_object_it_names() -> None:
    from fractions import Fraction

    assert TABLE["square"] is Fraction


def test_an_entry_is_imported_when_it_is_asked_for_and_not_before() -> None:
    assert "circle" in TABLE  # its module does not exist
    table: Registry[object] = Registry("game", {"snake": "turtledemo.chaos:main"})
    assert list(table) == ["snake"]
    assert "snake" in table
    assert "turtledemo.chaos" not in sys.modules


def test_a_table_lists_its_names_in_the_order_they_were_written() -> None:
    assert list(TABLE) == ["square", "circle", "line"]
    assert len(TABLE) == 3


def test_an_unknown_name_is_an_error_with_the_known_names_in_order() -> None:
    with pytest.raises(NotFound, match=r"^unknown shape 'hexagon'; known: circle, line, square$"):
        TABLE["hexagon"]


def test_a_name_that_was_not_written_is_not_in_the_table() -> None:
    assert "hexagon" not in TABLE


def test_an_empty_table_says_that_it_knows_nothing() -> None:
    empty: Registry[object] = Registry("shape", {})
    with pytest.raises(NotFound, match=r"known: none$"):
        empty["square"]


def test_a_broken_entry_fails_as_python_says_and_not_as_an_unknown_name() -> None:
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        TABLE["circle"]
    with pytest.raises(AttributeError, match="NoSuchName"):
        TABLE["line"]


def test_a_table_keeps_its_entries_when_the_mapping_it_was_made_from_changes() -> None:
    entries = {"square": "fractions:Fraction"}
    table: Registry[object] = Registry("shape", entries)
    entries["triangle"] = "fractions:Fraction"
    assert list(table) == ["square"]


def test_a_table_tells_of_an_entry_without_importing_it() -> None:
    table: Registry[object] = Registry("game", {"snake": "turtledemo.chaos:main"})
    assert Registry("shape", {"square": "fractions:Fraction"}).about("square") == "Fraction, infinite-precision, rational numbers."
    assert isinstance(table.about("snake"), str)
    assert "turtledemo.chaos" not in sys.modules
