"""What a conversion depends on, as one short text: two that share it write the same bytes."""

import hashlib
from collections.abc import Iterable
from dataclasses import fields
from importlib.metadata import version

import mlx.core as mx

from mlx_qwen.version import __version__

from ..outputs import Output, Outputs
from ..work import pieces
from ..writing import writer


def fingerprint(source: Iterable[str], outputs: Outputs) -> str:
    """SHA-256 of the source's files (as `source_lines` describes them), the outputs and the software."""
    lines = [
        f"mlx-qwen {__version__}, mlx {version('mlx')}, {mx.default_device()}",
        f"{pieces.PIECE_BYTES} {writer.SHARD_BYTES}",
        *source,
        *(_output_line(output) for output in outputs.all),
    ]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _output_line(output: Output) -> str:
    """All that says how the tensor is written; where it is read from follows from the source."""
    chosen = (getattr(output, field.name) for field in fields(output) if field.name != "target")
    return " ".join(map(repr, (output.entries, *chosen)))
