"""The quick part of conformance.py: uses of TensorRT's bindings in the backend's sources, which are read and not imported.

Run as `bindings.py FOLDER [SOURCE ...]`: also says what is wrong with each SOURCE. Prints one line of JSON.
"""

from __future__ import annotations

import ast
import json
import sys
from collections import Counter
from pathlib import Path

import stub

stub.load_bindings(Path(sys.argv[1]))

import api  # noqa: E402  # it imports tensorrt, which the line above made possible

SOURCES = Path(__file__).resolve().parents[4] / "compiler" / "backends" / "tensorrt"
NO_RUNTIME = {"__init__.py", "cache.py"}
"""Files that drive nothing of TensorRT."""


def sources() -> dict[str, int]:
    used: Counter[str] = Counter()
    for file in sorted(SOURCES.glob("*.py")):
        if file.name not in NO_RUNTIME:
            used += api.check_source(ast.parse(file.read_text("utf-8")), file.stem)
    return dict(used)


def problem(source: str) -> str:
    try:
        api.check_source(ast.parse(source), "wrong")
    except api.Problem as error:
        return str(error)
    return "none"


if __name__ == "__main__":
    print(json.dumps({"used": sources(), "problems": [problem(source) for source in sys.argv[2:]]}))
