"""Metal kernels for hybrid language models, each beside a reference in plain MLX.

Every operation lives in a package of its own (``gated_delta``, ``moe_dispatch``): ``op.py`` is what a model calls,
``reference.py`` is the definition. ``MLX_QWEN_KERNELS`` picks which one runs; :func:`stats` tells which one did.
"""

from metal_kernels._backend import Backend, OpStats, backend, reset_stats, stats

__all__ = ["Backend", "OpStats", "backend", "reset_stats", "stats"]
