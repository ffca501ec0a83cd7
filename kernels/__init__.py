"""The table of ops: what a model does between its matrix products, each as a formula in torch, a custom op and a Triton kernel.

A model calls the function of an op's file: `from reelstep.kernels.rms_modulate import rms_modulate`. Inside it is `torch.ops.reelstep.NAME`: the
formula on a CPU, the kernel on a GPU where Triton is installed, and one node in an exported graph, which the compiler keeps or takes apart.
"""

from __future__ import annotations

from reelstep.kernels.op import Op
from reelstep.registry import Registry

OPS: Registry[Op] = Registry(
    "op",
    {
        "rms_modulate": "reelstep.kernels.rms_modulate:OP",
        "qk_norm_rope": "reelstep.kernels.qk_norm_rope:OP",
        "attention": "reelstep.kernels.attention:OP",
        "lse_merge": "reelstep.kernels.lse_merge:OP",
        "gated_residual": "reelstep.kernels.gated_residual:OP",
        "swiglu": "reelstep.kernels.swiglu:OP",
        "gelu_tanh": "reelstep.kernels.gelu_tanh:OP",
        "fp8_norm_quantise": "reelstep.kernels.fp8_norm_quantise:OP",
        "patchify": "reelstep.kernels.patchify:OP",
        "unpatchify": "reelstep.kernels.unpatchify:OP",
        "solver_step": "reelstep.kernels.solver_step:OP",
    },
)
