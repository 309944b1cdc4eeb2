"""A plan: what a model needs, what a machine has, and what follows."""

from dataclasses import dataclass

from mlx_qwen.planning.bounds import Bound, Work
from mlx_qwen.planning.chips import GIB, Machine
from mlx_qwen.planning.weights import UNPACKED, Weights

_NOTE = """\
Bounds, not measurements: no machine with this bandwidth and arithmetic can be faster, and real rates are lower.
Prefill is left open where the chip's arithmetic rate is not published. A token takes {launches} launches: if they take
longer than "a launch" on average, they and not bandwidth set the pace of decoding."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Memory and bounds of one model for one sequence. Sizes are in bytes, rates in tokens a second.

    Attributes:
        model: as it was asked for.
        context: tokens of prompt and answer together.
        prefill_step_size: tokens of the prompt read at once.
        weights: the converted checkpoint's tensors, by part.
        kv: keys and values of the attention layers at the end of the context.
        kv_bits: bits of packed keys and values, None for bf16.
        state: what the Gated DeltaNet layers keep, however long the context.
        activations: an estimate of the arrays alive while the last piece of a prompt is read.
        vision: whether the vision tower is loaded.
        machine: memory, how much of it may be used, and the chip.
        largest_context: the most tokens that fit with these weights, None when not even one does.
        best_bits: the most bits with which this context fits, None when even 2 are too many.
        work: bytes, arithmetic and launches that the bounds follow from.
        bounds: of the machine's chip, or of every known one when the chip is not known.
        has_files: whether sizes come from the model's files; they follow from its configuration otherwise.
    """

    model: str
    context: int
    prefill_step_size: int
    weights: Weights
    kv: int
    kv_bits: int | None
    state: int
    activations: int
    vision: bool
    machine: Machine
    largest_context: int | None
    best_bits: int | None
    work: Work
    bounds: tuple[Bound, ...]
    has_files: bool

    @property
    def total(self) -> int:
        """Bytes of all that is in memory at once."""
        return resident_bytes(self.weights, vision=self.vision) + self.kv + self.state + self.activations

    @property
    def fits(self) -> bool:
        """Whether the machine has room for it."""
        return self.total <= self.machine.usable

    def table(self) -> str:
        """Lines of `label  value` for people, and a table of bounds below them."""
        return f"{_lines(self._rows())}\n\n{_bounds_table(self.bounds)}\n\n{_NOTE.format(launches=self.work.launches)}"

    def _rows(self) -> list[tuple[str, str]]:
        weights, machine = self.weights, self.machine
        kv = "" if self.kv_bits is None else f", packed to {self.kv_bits} bits"
        origin = "its files" if self.has_files else "its configuration"
        chip = "" if machine.chip is None else f"{machine.chip.name}, "
        rows = [
            ("Model", f"{self.model}, {_precision(weights.bits)}, sizes from {origin}"),
            ("Before conversion", "unknown" if weights.source is None else size(weights.source)),
            ("On the disk", size(weights.total)),
            ("", ""),
            ("Language model", size(weights.text)),
        ]
        if weights.mtp:
            rows.append(("MTP layer", size(weights.mtp)))
        if weights.vision:
            rows.append(("Vision tower", size(weights.vision) + ("" if self.vision else ", not loaded for text")))
        rows += [
            (f"{self.context:,} tokens", f"{size(self.kv)} of keys and values{kv}"),
            ("Linear attention", f"{size(self.state)} of state, at any context"),
            ("Activations", f"{size(self.activations)}, estimated for {self.prefill_step_size:,} tokens at once"),
            ("In memory", size(self.total)),
            ("", ""),
            ("Machine", f"{chip}{size(machine.memory)} of memory, {size(machine.usable)} of it for the model"),
            ("Fits", "yes" if self.fits else f"no, {size(self.total - machine.usable)} are missing"),
            ("Largest context", "none" if self.largest_context is None else f"{self.largest_context:,} tokens"),
            ("Best precision", "none" if self.best_bits is None else _precision(self.best_bits)),
        ]
        return rows


def resident_bytes(weights: Weights, *, vision: bool) -> int:
    """Bytes of the weights that are loaded."""
    return weights.text + weights.mtp + (weights.vision if vision else 0)


def size(nbytes: int) -> str:
    """`nbytes` in MiB, or from 1 GiB on in GiB."""
    return f"{nbytes / GIB:.2f} GiB" if nbytes >= GIB else f"{nbytes / (1 << 20):.1f} MiB"


def _precision(bits: int) -> str:
    return "not packed" if bits == UNPACKED else f"{bits} bits"


def _lines(rows: list[tuple[str, str]]) -> str:
    width = max(len(label) for label, _ in rows)
    return "\n".join(f"{label:<{width}}  {value}".rstrip() for label, value in rows)


def _bounds_table(bounds: tuple[Bound, ...]) -> str:
    lines = [f"{'':<16}{'decode, at most':>18}{'prefill, at most':>20}{'a launch':>12}"]
    for bound in bounds:
        prefill = "–" if bound.prefill is None else f"{bound.prefill:,.0f} tokens/s"
        decode, budget = f"{bound.decode:,.1f} tokens/s", f"{bound.launch_budget * 1e6:,.1f} µs"
        lines.append(f"{bound.chip.name:<16}{decode:>18}{prefill:>20}{budget:>12}")
    return "\n".join(lines)
