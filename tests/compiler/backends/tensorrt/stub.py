"""Makes `import tensorrt` and `import torch_tensorrt` work where TensorRT's libraries and a GPU are absent. For a process of its own.

The bindings are the real ones, over libraries that do nothing; so are Torch-TensorRT's lowering and converters. What is left out is its compiled
runtime (`lib/`), which needs the libraries, and what is made up is one GPU that can be asked its name and size.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch

GPU = SimpleNamespace(name="NVIDIA H100 80GB HBM3", major=9, minor=0, total_memory=80 << 30, multi_processor_count=132)


def load_bindings(folder: Path) -> None:
    """Makes `import tensorrt` give the bindings, over the libraries in `folder`."""
    for library in folder.glob("lib*.so.*"):
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    sys.modules["tensorrt"] = importlib.import_module("tensorrt_bindings")


def install(folder: Path) -> None:
    """`load_bindings`, and Torch-TensorRT without its `lib/`, as a package of links that is made beside the libraries."""
    load_bindings(folder)
    spec = importlib.util.find_spec("torch_tensorrt")
    assert spec is not None
    assert spec.origin is not None
    package = folder / "site" / "torch_tensorrt"
    if not package.exists():
        package.mkdir(parents=True)
        for entry in Path(spec.origin).parent.iterdir():
            if entry.name not in {"lib", "__pycache__"}:
                (package / entry.name).symlink_to(entry)
    sys.path.insert(0, str(package.parent))
    if not hasattr(torch._C, "_CudaDeviceProperties"):
        torch._C._CudaDeviceProperties = type("_CudaDeviceProperties", (), {})  # type: ignore[attr-defined]
    for name, value in {"get_device_capability": (9, 0), "get_device_properties": GPU, "current_device": 0}.items():
        setattr(torch.cuda, name, lambda *_, value=value: value)
    torch.cuda.mem_get_info = lambda *_: (64 << 30, 80 << 30)
    with mock.patch.multiple(torch.cuda, is_available=lambda: True, device_count=lambda: 1):  # later torch would try to use it
        importlib.import_module("torch_tensorrt")
