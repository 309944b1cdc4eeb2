"""The quality of a conversion on its model card."""

import os
from dataclasses import replace
from pathlib import Path

from mlx_qwen.config import ModelConfig
from mlx_qwen.convert.writing.staging import write_text
from mlx_qwen.prompt import Processor

from .plot import save_plot
from .result import Comparison
from .run import compare

PLOT_NAME = "quality.png"
_SECTION = """
## Quality

Compared with {reference} over {tokens:,} predictions on a text of several languages and kinds, in windows of {window}
tokens, with activations in float32.

| | |
|---|---|
| Perplexity, before | {a:.3f} |
| Perplexity, of this model | {b:.3f} ({change:+.2%}) |
| KL divergence, mean | {mean:.5f} nats |
| KL divergence, 99th percentile | {p99:.5f} nats |
| Same most likely token | {agreement:.2%} |

![Error by layer and kind of tensor]({plot})

{worst}
The error of a tensor is the norm of the difference as a share of the norm. `mlx-qwen compare` measures all of this.
"""


def check_verifiable(source: Path, config: ModelConfig) -> None:
    """Raise CheckpointError when `source` has no tokenizer, without which no text can be read."""
    Processor.from_directory(source, config)


def verify_conversion(
    source: Path, folder: Path, *, reference: str, name: str, progress: bool | None = None
) -> Comparison:
    """Compare `source` with the complete conversion in `folder`, and write what that shows into the folder's card.

    Adds a plot and a section at the end of README.md, which must be there and not have one.

    Args:
        source: in any format that `convert` reads.
        folder: with config.json, weights, tokenizer and README.md, wherever it is until it gets its final name.
        reference, name: what source and conversion are called.
        progress: as in `compare`.

    Raises:
        As `compare`.
    """
    comparison = replace(compare(source, folder, progress=progress), a=reference, b=name)
    plot, card = folder / PLOT_NAME, folder / "README.md"
    save_plot(comparison, plot)
    with plot.open("rb") as file:
        os.fsync(file.fileno())
    write_text(card, card.read_text(encoding="utf-8") + section(comparison))
    return comparison


def section(comparison: Comparison) -> str:
    """The part of a model card about `comparison`, in Markdown; its plot is the file PLOT_NAME."""
    rows = [f"| `{tensor.name}` | {tensor.relative:.4f} |" for tensor in comparison.worst()]
    return _SECTION.format(
        reference=Path(comparison.a).name,
        tokens=comparison.tokens,
        window=comparison.window,
        a=comparison.perplexity_a,
        b=comparison.perplexity_b,
        change=comparison.perplexity_change,
        mean=comparison.mean_divergence,
        p99=comparison.p99_divergence,
        agreement=comparison.agreement,
        plot=PLOT_NAME,
        worst="\n".join(["| Worst tensors | error |", "|---|---|", *rows, ""]) if rows else "All tensors are equal.\n",
    )
