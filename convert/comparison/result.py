"""What a comparison found, as values, as a table and as JSON."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from mlx_qwen.config import Json

from ..recipes.kinds import Kind
from .tensors import TensorError

_WORST = 8


@dataclass(frozen=True, slots=True)
class Comparison:
    """How far checkpoint `b` is from checkpoint `a`.

    Predictions are of `tokens` tokens, all but the first of each window: perplexity exp(mean −log p), the divergence
    KL(a ‖ b) in nats, its mean and its 99th percentile, and the share of tokens of which both find the same one most
    likely. `layers` holds ‖a − b‖ / ‖a‖ of the hidden states after each decoder layer. `tensors` are those that both
    checkpoints have, in reading order; `only_a` and `only_b` name the others.
    """

    a: str
    b: str
    tokens: int
    window: int
    perplexity_a: float
    perplexity_b: float
    mean_divergence: float
    p99_divergence: float
    agreement: float
    layers: tuple[float, ...]
    tensors: tuple[TensorError, ...]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]

    @property
    def perplexity_change(self) -> float:
        """How much larger the perplexity of `b` is, as a share of that of `a`."""
        return self.perplexity_b / self.perplexity_a - 1

    def worst(self, count: int = _WORST) -> tuple[TensorError, ...]:
        """The tensors with the largest relative errors, the largest first; equal tensors are left out."""
        differing = [tensor for tensor in self.tensors if tensor.distance]
        return tuple(sorted(differing, key=lambda tensor: -tensor.relative)[:count])

    def by_kind(self) -> dict[Kind, float]:
        """Relative error of all tensors of each kind together, in the order of `Kind`."""
        return {
            kind: relative_error(of_kind)
            for kind in Kind
            if (of_kind := [tensor for tensor in self.tensors if tensor.kind is kind])
        }

    def table(self) -> str:
        """Lines of `label  value` for people."""
        rows = [
            ("Reference", self.a),
            ("Compared", self.b),
            ("Text", f"{self.tokens:,} predictions in windows of {self.window} tokens"),
            ("Perplexity", f"{self.perplexity_a:.3f} and {self.perplexity_b:.3f} ({self.perplexity_change:+.2%})"),
            ("KL divergence", f"{self.mean_divergence:.5f} nats, 99th percentile {self.p99_divergence:.5f}"),
            ("Same top token", f"{self.agreement:.2%}"),
            ("Hidden states", self._hidden_states()),
        ]
        rows += [(f"Error of {kind.value}", f"{error:.5f}") for kind, error in self.by_kind().items() if error]
        rows += [("Worst tensors" if i == 0 else "", f"{t.relative:.5f}  {t.name}") for i, t in enumerate(self.worst())]
        for label, names in (("Only in the first", self.only_a), ("Only in the second", self.only_b)):
            if names:
                rows.append((label, f"{len(names)} tensors, such as {names[0]}"))
        width = max(len(label) for label, _ in rows)
        return "\n".join(f"{label:<{width}}  {value}" for label, value in rows)

    def as_json(self) -> Json:
        """Every number, for other programs; what is not finite becomes null."""
        return {
            "a": self.a,
            "b": self.b,
            "tokens": self.tokens,
            "window": self.window,
            "perplexity": {"a": _number(self.perplexity_a), "b": _number(self.perplexity_b)},
            "kl_divergence_nats": {"mean": _number(self.mean_divergence), "p99": _number(self.p99_divergence)},
            "top1_agreement": self.agreement,
            "hidden_state_error_by_layer": [_number(error) for error in self.layers],
            "tensors": [
                {
                    "name": tensor.name,
                    "kind": tensor.kind.value,
                    "layer": tensor.layer,
                    "parameters": tensor.parameters,
                    "relative_error": _number(tensor.relative),
                    "rms_error": _number(tensor.distance),
                }
                for tensor in self.tensors
            ],
            "only_in_a": list(self.only_a),
            "only_in_b": list(self.only_b),
        }

    def _hidden_states(self) -> str:
        if not any(self.layers):
            return "equal after every layer"
        worst = max(range(len(self.layers)), key=self.layers.__getitem__)
        return f"error {self.layers[-1]:.5f} after the last layer, at most {self.layers[worst]:.5f} after layer {worst}"


def relative_error(tensors: Iterable[TensorError]) -> float:
    """‖a − b‖ / ‖a‖ over all of `tensors` together."""
    distance = magnitude = 0.0
    for tensor in tensors:
        distance += tensor.parameters * tensor.distance**2
        magnitude += tensor.parameters * tensor.magnitude**2
    if magnitude:
        return math.sqrt(distance / magnitude)
    return math.inf if distance else 0.0


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
