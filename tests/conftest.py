"""For all tests."""

from __future__ import annotations

import pytest


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is not None:
        import torch  # here: tests of what is light need not wait for it

        if not torch.cuda.is_available():
            pytest.skip(f"torch {torch.__version__} sees no CUDA device")
