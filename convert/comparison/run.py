"""`compare`: two checkpoints of one model side by side, layer after layer."""

import math
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import fields
from pathlib import Path
from typing import Unpack

import mlx.core as mx
import numpy as np

from mlx_qwen.checkpoint.hub import resolve
from mlx_qwen.checkpoint.names import decoder_layer
from mlx_qwen.declared import check_keywords, check_value, chosen, takes
from mlx_qwen.errors import ConversionError
from mlx_qwen.model.decoder import Residual
from mlx_qwen.prompt import Processor

from ..arrays import FLOATS
from ..layerwise import LayerwiseModel
from ..progress import Progress
from .distributions import Predictions, predictions
from .options import ComparisonKeywords, ComparisonOptions
from .result import Comparison
from .source import open_decoded
from .tensors import TensorError, bytes_to_read, matched, sum_of_squares, tensor_error
from .texts import batches, read_text, token_ids

# What may differ between checkpoints that compute the same function.
_FREE_FIELDS = ("max_position_embeddings", "mtp_num_hidden_layers", "eos_token_ids", "tie_word_embeddings")


@takes(ComparisonOptions)
def compare(a: str | Path, b: str | Path, **options: Unpack[ComparisonKeywords]) -> Comparison:
    """Measure how far checkpoint `b` is from checkpoint `a`: on a text, layer by layer, and tensor by tensor.

    Both run in step, one decoder layer of each in memory at a time, and the vocabulary in blocks, so that models larger
    than memory can be compared. Either may be in any format that `convert` reads.

    Args:
        a: the reference, a folder or Hub repository, such as the unquantized model.
        b: the other, such as its conversion.
        {options}

    Returns:
        Perplexities, divergence and agreement of the predictions, and errors by layer and by tensor.

    Raises:
        ConfigError: a config.json is missing or describes no model of this family.
        CheckpointError: files are missing or damaged, or tensors do not match their config.
        ConversionError: the models or their tokenizers differ, the text is unreadable or too short, an option is
            impossible, or weights, hidden states or logits of a model are NaN or infinite.
    """
    for name, folder in (("a", a), ("b", b)):
        check_value(name, folder, str | Path, error=ConversionError)
    check_keywords(options, ComparisonOptions, error=ConversionError)
    asked = chosen(ComparisonOptions, options)
    folder_a, folder_b = resolve(a), resolve(b)
    kind = FLOATS[asked.dtype].mlx
    with ExitStack() as stack:
        model_a = stack.enter_context(open_decoded(folder_a, dtype=kind, adapter_path=asked.adapter_path))
        model_b = stack.enter_context(open_decoded(folder_b, dtype=kind))
        _check_architectures(model_a, model_b)
        processor_a = Processor.from_directory(folder_a, model_a.config)
        processor_b = Processor.from_directory(folder_b, model_b.config)
        ids = token_ids(processor_a, processor_b, read_text(asked.text), asked.tokens)
        windows = list(batches(ids, asked.window))
        return _Run(model_a, model_b, (str(a), str(b)), windows, asked.progress).result(asked.window)


class _Run:
    """Two models, of these `names`, on their way through the same batches, int [B, T] each."""

    def __init__(
        self,
        a: LayerwiseModel,
        b: LayerwiseModel,
        names: tuple[str, str],
        windows: list[mx.array],
        progress: bool | None,
    ) -> None:
        self.a, self.b = a, b
        self.names = names
        self.batches = windows
        self.pairs = matched(a.plan, b.plan)
        self.tensors: dict[str, TensorError] = {}
        self.layer_errors: list[float] = []
        size = bytes_to_read(target for pair in self.pairs.values() for target in pair)
        self._progress = Progress(size, progress, verb="Comparing")

    def result(self, window: int) -> Comparison:
        with self._progress:
            # First, so that a damaged tensor is named before it makes everything else NaN.
            self._compare_tensors(name for name in self.pairs if decoder_layer(name) is None)
            found = self._predictions()
        names_a, names_b = ([target.spec.name for target in model.plan.targets] for model in (self.a, self.b))
        return Comparison(
            a=self.names[0],
            b=self.names[1],
            tokens=found.divergence.size,
            window=window,
            perplexity_a=float(np.exp(found.surprise_a.mean(dtype=np.float64))),
            perplexity_b=float(np.exp(found.surprise_b.mean(dtype=np.float64))),
            mean_divergence=float(found.divergence.mean(dtype=np.float64)),
            p99_divergence=float(np.quantile(found.divergence, 0.99)),
            agreement=float(found.agreement.mean()),
            layers=tuple(self.layer_errors),
            tensors=tuple(self.tensors[name] for name in self.pairs),
            only_a=tuple(name for name in names_a if name not in self.pairs),
            only_b=tuple(name for name in names_b if name not in self.pairs),
        )

    def _predictions(self) -> Predictions:
        """What both models predict of every token but the first of each window."""
        states = [(self.a.embed(ids), self.b.embed(ids)) for ids in self.batches]
        for layer_a, layer_b in zip(self.a.layers(), self.b.layers(), strict=True):
            # Now, while the system still has the layer's pages.
            self._compare_tensors(target.spec.name for target in layer_a.targets)
            for i, (state_a, state_b) in enumerate(states):
                states[i] = layer_a(state_a), layer_b(state_b)
            magnitude, distance = _squares(states)
            self._check_finite(f"The hidden states after layer {layer_a.index}", magnitude, distance)
            self.layer_errors.append(_share(distance, magnitude))
        found = predictions(
            self.a,
            self.b,
            _rows([self.a.normed(state)[:, :-1] for state, _ in states]),
            _rows([self.b.normed(state)[:, :-1] for _, state in states]),
            mx.concatenate([ids[:, 1:].flatten() for ids in self.batches]),
        )
        self._check_finite("The logits", float(found.surprise_a.sum()), float(found.surprise_b.sum()))
        return found

    def _compare_tensors(self, names: Iterable[str]) -> None:
        """Compare the named tensors, of those that both have."""
        for name in names:
            if name not in self.pairs:
                continue
            error = self.tensors[name] = tensor_error(*self.pairs[name])
            for model, found in zip(self.names, (error.magnitude, error.distance), strict=True):
                if not math.isfinite(found):
                    raise ConversionError(
                        f"{model} is damaged: {name} holds NaN or infinite values. Download or convert it again."
                    )
            self._progress.advance(bytes_to_read(self.pairs[name]))

    def _check_finite(self, what: str, *found: float) -> None:
        """Raise ConversionError unless what was found of each model's part is finite."""
        for model, value in zip(self.names, found, strict=True):
            if not math.isfinite(value):
                raise ConversionError(
                    f"{what} of {model} are NaN or infinite. If it was compared in float16, use float32, which reaches "
                    "further. Otherwise its weights are damaged: download or convert it again."
                )


def _rows(blocks: list[mx.array]) -> mx.array:
    rows = mx.concatenate([block.reshape(-1, block.shape[-1]) for block in blocks])
    mx.eval(rows)
    return rows


def _squares(states: list[tuple[Residual, Residual]]) -> tuple[float, float]:
    """‖a‖² and ‖a − b‖² of all hidden states."""
    magnitude = distance = 0.0
    for state_a, state_b in states:
        exact = state_a.sum()
        magnitude += sum_of_squares(exact.astype(mx.float32))
        distance += sum_of_squares((exact - state_b.sum()).astype(mx.float32))
    return magnitude, distance


def _share(distance: float, magnitude: float) -> float:
    """‖a − b‖ / ‖a‖ of their squares."""
    if magnitude:
        return math.sqrt(distance / magnitude)
    return math.inf if distance else 0.0


def _check_architectures(a: LayerwiseModel, b: LayerwiseModel) -> None:
    texts = a.config.text, b.config.text
    differing = [
        f"{field.name} ({getattr(texts[0], field.name)} and {getattr(texts[1], field.name)})"
        for field in fields(texts[0])
        if field.name not in _FREE_FIELDS and getattr(texts[0], field.name) != getattr(texts[1], field.name)
    ]
    if a.config.is_next != b.config.is_next:
        differing.insert(0, f"model_type ({a.config.model_type} and {b.config.model_type})")
    if differing:
        shown = ", ".join(differing[:4]) + (f" and {len(differing) - 4} more" if len(differing) > 4 else "")
        raise ConversionError(
            f"The two checkpoints are of different models: {shown}. Compare a checkpoint with a conversion of the same "
            "model."
        )
