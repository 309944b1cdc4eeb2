"""What a conversion did, as values and as a table."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from mlx_qwen.checkpoint.layout import Quantization

from .comparison import Comparison
from .description import Description
from .measures import readable_size
from .recipes.precisions import shown_precision


@dataclass(frozen=True, slots=True)
class ConversionReport:
    """The outcome of a conversion, or with `dry_run` what it would be (times and memory are then 0).

    Sizes count bytes of tensors. `bits_per_weight` is 8 · output_bytes / parameters. `peak_memory` is how far the
    process's peak resident memory rose above its peak before, in bytes; `mlx_peak_memory` is what MLX itself held.
    `description` lists what is written; `quantization` is the precision that config.json names for all modules without
    their own, None when none is packed. `indivisible` names matrices left unpacked because their columns do not divide
    into groups; `non_finite` those whose values `dtype` is too narrow for, so that some became infinite. `kept_codes`
    names matrices whose codes another runtime's quantization chose and which are written unchanged; for those in
    `rounded_scales`, scales or biases were rounded to `dtype`. `url` is where the output was uploaded to, `quality`
    what verifying it found.
    """

    path: Path
    source: Path
    description: Description
    quantization: Quantization | None
    dtype: str
    source_bytes: int
    output_bytes: int
    parameters: int
    seconds: float
    peak_memory: int
    mlx_peak_memory: int
    indivisible: tuple[str, ...]
    non_finite: tuple[str, ...]
    kept_codes: tuple[str, ...]
    rounded_scales: tuple[str, ...]
    dry_run: bool
    url: str | None = None
    quality: Comparison | None = None

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.output_bytes / self.parameters

    def table(self) -> str:
        """Lines of `label  value` for people."""
        rows = [
            ("Output" if not self.dry_run else "Output (not written)", str(self.path)),
            ("Precision", self._precision()),
            ("Parameters", f"{self.parameters:,}"),
            ("Size before", readable_size(self.source_bytes)),
            ("Size after", readable_size(self.output_bytes)),
            ("Bits per weight", f"{self.bits_per_weight:.3f}"),
        ]
        if not self.dry_run:
            memory = f"{readable_size(self.peak_memory)} above the start, {readable_size(self.mlx_peak_memory)} in MLX"
            rows += [("Time", f"{self.seconds:.1f} s"), ("Peak memory", memory)]
        if self.url is not None:
            rows.append(("Uploaded to", self.url))
        if self.indivisible:
            rows.append(("Left unpacked", f"{len(self.indivisible)} matrices whose columns do not divide into groups"))
        if self.kept_codes:
            rows.append(("Codes kept", self._kept_codes()))
        if self.non_finite:
            rows.append(("NaN or infinite", f"{len(self.non_finite)} tensors, such as {self.non_finite[0]}"))
        width = max(len(label) for label, _ in rows)
        return "\n".join(f"{label:<{width}}  {value}" for label, value in rows)

    def _precision(self) -> str:
        """The packed precisions, that of most weights first, and the dtype of the rest."""
        weights: Counter[Quantization] = Counter()
        for row in self.description.rows:
            if row.quantization is not None:
                weights[row.quantization] += row.parameters
        if not weights:
            return self.dtype
        shown = [shown_precision(kind, self.dtype) for kind, _ in weights.most_common()]
        if 2 * max(weights.values()) > self.parameters:
            shown[0] = f"mostly {shown[0]}"
        return f"{self.description.recipe}: {'; '.join([*shown, f'the rest {self.dtype}'])}"

    def _kept_codes(self) -> str:
        count = f"{len(self.kept_codes)} matrices"
        if self.dry_run:
            return count
        if not self.rounded_scales:
            return f"{count}, without loss"
        return f"{count}; of {len(self.rounded_scales)} the scales or biases were rounded to {self.dtype}"
