"""Tables of things by name. An entry is a string `module:attribute`, imported when it is first asked for.

Adding a thing is one file and one line in its table: MODELS, SOLVERS, PIPELINES, BACKENDS, SKUS, OPS, COMMANDS.
"""

from __future__ import annotations

from ast import get_docstring, parse
from collections.abc import Iterator, Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Generic, TypeVar

from reelstep.errors import unknown

T = TypeVar("T")


class Registry(Mapping[str, T], Generic[T]):
    """A read-only table. `kind` is the word that errors use: "model", "solver", ..."""

    def __init__(self, kind: str, entries: Mapping[str, str]) -> None:
        self.kind = kind
        self._entries = dict(entries)

    def __getitem__(self, name: str) -> T:
        """The thing called `name`. Raises NotFound with the known names beside it."""
        if name not in self._entries:
            raise unknown(self.kind, name, self._entries)
        module, attribute = self._entries[name].split(":")
        found: Any = getattr(import_module(module), attribute)
        return found  # type: ignore[no-any-return]

    def about(self, name: str) -> str:
        """What the module of an entry says of itself in its first line. It is read and not imported."""
        found = find_spec(self._entries[name].split(":")[0])
        assert found is not None
        assert found.origin is not None
        return (get_docstring(parse(Path(found.origin).read_bytes())) or "").partition("\n")[0]

    def listing(self) -> str:
        """A line for each entry: its name and what it is."""
        width = max(map(len, self))
        return "\n".join(f"{name:<{width}}  {self.about(name)}" for name in self)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)
