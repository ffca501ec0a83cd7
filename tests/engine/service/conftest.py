"""A server with the fake engine, in this process and on a thread of its own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from reelstep.tests.engine.service.in_process import Served, served


@pytest.fixture(scope="module")
def fake() -> Iterator[Served]:
    with served() as running:
        yield running
