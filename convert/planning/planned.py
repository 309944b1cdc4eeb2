"""A plan: what a model needs, what a machine has, and what follows."""

from dataclasses import dataclass

from mlx_qwen.sizes import GIB

from .bounds import Bound, Work
from .machine import Machine
from .weight_sizes import UNPACKED, Weights

_NOTE = """\
Bounds, not measurements: no machine with this bandwidth and arithmetic can be faster, and real rates are lower.
Prefill is left open where the chip's arithmetic rate is not published. A token takes {launches} launches: if they take
longer than "a launch" on average, they and not bandwidth set the pace of decoding."""
_NETWORK = """
What the ranks wait for each other, two sums a layer, comes on top of these."""


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
        ranks: machines that share the model. Weights, keys and values, state, work and bounds are those of each, and
            what the ranks send each other comes on top.
        network: seconds that the ranks wait for each other for each token; None where nobody knows their connection.
        stored: the whole checkpoint's tensors, by part.
        machine: memory, how much of it may be used, and the chip.
        largest_context: the most tokens that fit with these weights, None when not even one does.
        best_recipe: that of most bytes with which this context fits, None when even 2 bits are too many.
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
    ranks: int
    network: float | None
    stored: Weights
    machine: Machine
    largest_context: int | None
    best_recipe: str | None
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
        note = _NOTE.format(launches=self.work.launches) + _NETWORK * (self.ranks > 1)
        return f"{_lines(self._rows())}\n\n{_bounds_table(self.bounds)}\n\n{note}"

    def _rows(self) -> list[tuple[str, str]]:
        weights, stored, machine = self.weights, self.stored, self.machine
        kv = "" if self.kv_bits is None else f", packed to {self.kv_bits} bits"
        origin = "its files" if self.has_files else "its configuration"
        chip = "" if machine.chip is None else f"{machine.chip.name}, "
        beside = f", {stored.text_bits:.2f} without vision and MTP" if stored.vision or stored.mtp else ""
        rows = [
            ("Model", f"{self.model}, sizes from {origin}"),
            ("Recipe", f"{_shown(stored.recipe)}, {stored.bits_per_weight:.2f} bits per weight{beside}"),
            ("Before conversion", "unknown" if stored.source is None else size(stored.source)),
            ("On the disk", size(stored.total)),
            ("", ""),
        ]
        if self.ranks > 1:
            rows.append(("Each of", f"{self.ranks} ranks, which share the model and send each other sums"))
        if self.network is not None:
            said = (
                f"{1e3 * self.network:.2f} ms of waiting a token, so that {1 / self.network:,.0f} tokens/s are the most"
            )
            rows.append(("Network", said))
        rows.append(("Language model", size(weights.text)))
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
            ("Best recipe", "none" if self.best_recipe is None else _shown(self.best_recipe)),
        ]
        return rows


def resident_bytes(weights: Weights, *, vision: bool) -> int:
    """Bytes of the weights that are loaded."""
    return weights.text + weights.mtp + (weights.vision if vision else 0)


def size(nbytes: int) -> str:
    """`nbytes` in MiB, or from 1 GiB on in GiB."""
    return f"{nbytes / GIB:.2f} GiB" if nbytes >= GIB else f"{nbytes / (1 << 20):.1f} MiB"


def _shown(recipe: str) -> str:
    return "not packed" if recipe == UNPACKED else recipe


def _lines(rows: list[tuple[str, str]]) -> str:
    width = max(len(label) for label, _ in rows)
    return "\n".join(f"{label:<{width}}  {value}".rstrip() for label, value in rows)


def _bounds_table(bounds: tuple[Bound, ...]) -> str:
    lines = [f"{'':<16}{'decode, at most':>18}{'prefill, at most':>20}{'a launch':>12}"]
    for bound in bounds:
        prefill = "–" if bound.prefill is None else f"{bound.prefill:,.0f} tokens/s"
        decode, budget = f"{bound.decode:,.1f} tokens/s", f"{bound.launch_budget * 1e6:,.1f} µs"
        name = bound.chip.name + ("*" if bound.chip.unconfirmed else "")
        lines.append(f"{name:<16}{decode:>18}{prefill:>20}{budget:>12}")
    if any(bound.chip.unconfirmed for bound in bounds):
        lines.append("* from a bandwidth or arithmetic rate that no second source confirmed")
    return "\n".join(lines)
