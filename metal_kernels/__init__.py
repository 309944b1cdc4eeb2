"""Metal kernels for hybrid language models, each beside a reference in plain MLX.

Every group of operations has a package (``gated_delta``, ``moe_dispatch``, ``attention``, ``norm``, ``greedy``):
``op.py`` is what a model or an engine calls, ``reference.py`` is the definition. ``MLX_QWEN_KERNELS`` picks which one
runs; :func:`stats` tells which one did.
"""

from metal_kernels._backend import Backend, OpStats, backend, machine_chooses, reset_stats, stats

__all__ = ["Backend", "OpStats", "backend", "machine_chooses", "reset_stats", "stats"]
