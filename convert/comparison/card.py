"""The quality of a conversion on its model card."""

import os
from dataclasses import replace
from pathlib import Path

from mlx_qwen.config import ModelConfig
from mlx_qwen.prompt import Processor

from ..writing.staging import write_text
from .plot import save_plot
from .result import Comparison
from .run import compare
from .texts import FEWEST_TOKENS, read_text, token_ids

PLOT_NAME = "quality.png"
_SECTION = """
## Quality

Compared with {reference} over {tokens:,} predictions on {text}, in windows of {window} tokens, with activations in
float32.

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


def check_verifiable(source: Path, config: ModelConfig, text: Path | None) -> None:
    """Raise CheckpointError when `source` has no tokenizer, without which no text can be read, and ConversionError
    when the file `text` cannot be read or holds too little."""
    processor = Processor.from_directory(source, config)
    if text is not None:
        token_ids(processor, processor, read_text(text), FEWEST_TOKENS)


def verify_conversion(
    source: Path,
    folder: Path,
    *,
    reference: str,
    name: str,
    text: Path | None = None,
    progress: bool | None = None,
    adapter_path: str | Path | None = None,
) -> Comparison:
    """Compare `source` with the complete conversion in `folder`, and write what that shows into the folder's card.

    Adds a plot and a section at the end of README.md, which must be there and not have one.

    Args:
        source: in any format that `convert` reads.
        folder: with config.json, weights, tokenizer and README.md, wherever it is until it gets its final name.
        reference, name: what source and conversion are called.
        text, progress, adapter_path: as in `compare`.

    Raises:
        As `compare`.
    """
    comparison = compare(source, folder, text=text, progress=progress, adapter_path=adapter_path)
    comparison = replace(comparison, a=reference, b=name)
    plot, card = folder / PLOT_NAME, folder / "README.md"
    save_plot(comparison, plot)
    with plot.open("rb") as file:
        os.fsync(file.fileno())
    write_text(card, card.read_text(encoding="utf-8") + section(comparison, text))
    return comparison


def section(comparison: Comparison, text: Path | None = None) -> str:
    """The part of a model card about `comparison` on `text`, in Markdown; its plot is the file PLOT_NAME."""
    rows = [f"| `{tensor.name}` | {tensor.relative:.4f} |" for tensor in comparison.worst()]
    return _SECTION.format(
        reference=Path(comparison.a).name,
        tokens=comparison.tokens,
        text="a text of several languages and kinds" if text is None else f"the text {text.name}",
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
