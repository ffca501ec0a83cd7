"""Reelstep: compiled, few-step inference for media-generation models.

Importing this is light: torch and the backends are imported by the modules that need them.
"""

__all__ = ["__version__"]

__version__ = "0.1.0"
