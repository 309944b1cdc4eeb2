"""The picture of a comparison: error by layer and kind of tensor, hidden states, and the worst tensors."""

import math
from collections import defaultdict
from pathlib import Path

from mlx_qwen.canvas import FAINT, RULE, Canvas, blend
from mlx_qwen.errors import ConversionError

from ..recipes.kinds import Kind
from .result import Comparison, relative_error
from .tensors import TensorError

_WIDTH, _MARGIN, _GUTTER, _LEGEND = 1000, 36, 176, 96
_ROW, _CHART, _BAR, _WIDEST = 22, 96, 20, 48
_PALETTE = ("#eaf2fa", "#a9cdea", "#4a90c9", "#1d5a96", "#0c2d55")
_ACCENT, _TINT, _EMPTY = "#d9662b", "#fbe9df", "#f6f8fa"
_MOST_LABELS = 24
_FORMATS = (".png", ".webp", ".jpg", ".jpeg")

Cells = dict[tuple[Kind, int], float]


def check_plot(path: Path) -> None:
    """Raise ConversionError for a file name that does not end as pictures do."""
    if path.suffix.lower() not in _FORMATS:
        raise ConversionError(f"{path.name} does not end in {', '.join(_FORMATS)}. Choose another name for the plot.")


def save_plot(comparison: Comparison, path: Path) -> None:
    """Draw `comparison` into a PNG, WebP or JPEG file, by the ending of its name; see `check_plot`."""
    check_plot(path)
    cells = _cells(comparison.tensors)
    kinds = list(dict.fromkeys(kind for kind in Kind for cell in cells if cell[0] is kind))
    worst = comparison.worst()
    top = 162
    chart = top + max(1, len(kinds)) * _ROW + 74
    list_top = chart + _CHART + 70
    canvas = Canvas(_WIDTH, list_top + max(1, len(worst)) * _BAR + 24)
    _header(canvas, comparison)
    _heat_map(canvas, top, cells, kinds, len(comparison.layers))
    _hidden_states(canvas, chart, comparison.layers)
    _worst_tensors(canvas, list_top, worst)
    canvas.save(path)


def _cells(tensors: tuple[TensorError, ...]) -> Cells:
    """The relative error of each kind in each decoder layer, of those kinds that differ anywhere."""
    members: dict[tuple[Kind, int], list[TensorError]] = defaultdict(list)
    for tensor in tensors:
        if tensor.layer is not None:
            members[tensor.kind, tensor.layer].append(tensor)
    errors = {cell: relative_error(found) for cell, found in members.items()}
    differing = {kind for (kind, _), error in errors.items() if error}
    return {cell: error for cell, error in errors.items() if cell[0] in differing}


def _header(canvas: Canvas, comparison: Comparison) -> None:
    name, reference = (Path(path).name or path for path in (comparison.b, comparison.a))
    canvas.text((_MARGIN, 34), name, size=20)
    canvas.text((_MARGIN, 57), f"compared with {reference} on {comparison.tokens:,} predictions", color=FAINT)
    figures = (
        ("Perplexity", f"{comparison.perplexity_b:.3f}", f"{comparison.perplexity_change:+.2%}"),
        ("KL divergence", f"{comparison.mean_divergence:.4f}", "nats, mean"),
        ("KL divergence", f"{comparison.p99_divergence:.4f}", "nats, 99th percentile"),
        ("Same top token", f"{comparison.agreement:.2%}", ""),
    )
    for i, (label, value, unit) in enumerate(figures):
        x = _MARGIN + i * 235
        canvas.line([(x, 80), (x, 116)], _ACCENT, width=2)
        canvas.text((x + 10, 86), label, size=10, color=FAINT)
        canvas.text((x + 10, 106), value, size=17)
        canvas.text((x + 16 + canvas.width_of(value, 17), 108), unit, size=10, color=FAINT)


def _heat_map(canvas: Canvas, top: int, cells: Cells, kinds: list[Kind], layers: int) -> None:
    canvas.text((_MARGIN, top - 18), "Relative error of the weights, by layer and kind of tensor", size=12)
    if not cells:
        canvas.text((_MARGIN, top + _ROW / 2), "The weights of all decoder layers are equal.", color=FAINT)
        return
    low, high = _bounds(cells)
    step = _column_width(layers)
    gap = 1 if step > 4 else 0
    for row, kind in enumerate(kinds):
        y = top + row * _ROW
        canvas.text((_MARGIN + _GUTTER - 12, y + _ROW / 2), kind.value, size=10.5, anchor="rm")
        for layer in range(layers):
            error = cells.get((kind, layer))
            color = _EMPTY if error is None else _shade(error, low, high)
            canvas.box((_MARGIN + _GUTTER + layer * step, y), (step - gap, _ROW - 1), color, radius=min(2, step / 6))
    _layer_labels(canvas, top + len(kinds) * _ROW + 10, layers)
    _legend(canvas, top, low, high)


def _legend(canvas: Canvas, top: int, low: float, high: float) -> None:
    x, height, slices = _WIDTH - _MARGIN - 62, 110, 110
    for i in range(slices):
        canvas.box((x, top + i * height / slices), (12, height / slices + 0.5), _color(1 - i / (slices - 1)))
    for share in (0.0, 0.5, 1.0):
        y = top + (1 - share) * height
        canvas.text((x + 18, y), f"{low * (high / low) ** share:.2g}", size=10, color=FAINT)
    canvas.text((x, top + height + 14), "log scale", size=9.5, color=FAINT)


def _hidden_states(canvas: Canvas, top: int, errors: tuple[float, ...]) -> None:
    canvas.text((_MARGIN, top - 18), "Relative error of the hidden states after each layer", size=12)
    finite = [error if math.isfinite(error) else 0.0 for error in errors]
    ceiling = _rounded_up(max(finite)) or 1.0
    left, step = _MARGIN + _GUTTER, _column_width(len(errors))
    for share in (0.0, 0.5, 1.0):
        y = top + _CHART * (1 - share)
        canvas.line([(left, y), (left + step * len(errors), y)], RULE, width=0.75)
        canvas.text((left - 12, y), f"{ceiling * share:.3g}", size=10, color=FAINT, anchor="rm")
    points = [(left + (i + 0.5) * step, top + _CHART * (1 - error / ceiling)) for i, error in enumerate(finite)]
    floor = top + _CHART
    canvas.area([(points[0][0], floor), *points, (points[-1][0], floor)], _TINT)
    canvas.line(points, _ACCENT, width=1.6)
    for point in points:
        canvas.dot(point, 2.2 if step > 8 else 1.4, _ACCENT)
    _layer_labels(canvas, floor + 14, len(errors))


def _worst_tensors(canvas: Canvas, top: int, worst: tuple[TensorError, ...]) -> None:
    canvas.text((_MARGIN, top - 18), "Tensors with the largest relative error", size=12)
    if not worst:
        canvas.text((_MARGIN, top + _BAR / 2), "All tensors are equal.", color=FAINT)
        return
    names = [tensor.name.removeprefix("language_model.").removesuffix(".weight") for tensor in worst]
    left = _MARGIN + max(canvas.width_of(name, 10.5) for name in names) + 14
    room = _WIDTH - _MARGIN - 60 - left
    largest = max((tensor.relative for tensor in worst if math.isfinite(tensor.relative)), default=1.0)
    for i, (name, tensor) in enumerate(zip(names, worst, strict=True)):
        y = top + i * _BAR
        length = room * min(tensor.relative / largest, 1.0)
        canvas.text((_MARGIN, y + _BAR / 2), name, size=10.5)
        canvas.box((left, y + 3), (length, _BAR - 6), _PALETTE[2], radius=2)
        canvas.text((left + length + 8, y + _BAR / 2), f"{tensor.relative:.4f}", size=10, color=FAINT)


def _layer_labels(canvas: Canvas, y: float, layers: int) -> None:
    every = next(step for step in (1, 2, 4, 5, 10, 20, 50, layers) if layers / step <= _MOST_LABELS)
    step = _column_width(layers)
    for layer in range(0, layers, every):
        x = _MARGIN + _GUTTER + (layer + 0.5) * step
        canvas.text((x, y), str(layer), size=9.5, color=FAINT, anchor="mm")
    canvas.text((_MARGIN + _GUTTER - 12, y), "layer", size=9.5, color=FAINT, anchor="rm")


def _column_width(layers: int) -> float:
    return min((_WIDTH - 2 * _MARGIN - _GUTTER - _LEGEND) / layers, _WIDEST)


def _bounds(cells: Cells) -> tuple[float, float]:
    """Where the colours begin and end: three decades at most, one at least."""
    errors = [error for error in cells.values() if error and math.isfinite(error)]
    high = max(errors, default=1.0)
    return min(max(min(errors, default=high), high / 1000), high / 10), high


def _shade(error: float, low: float, high: float) -> str:
    if not error:
        return _EMPTY
    return _color(math.log(min(max(error, low), high) / low) / math.log(high / low))


def _color(share: float) -> str:
    place = share * (len(_PALETTE) - 1)
    first = min(int(place), len(_PALETTE) - 2)
    return blend(_PALETTE[first], _PALETTE[first + 1], place - first)


def _rounded_up(value: float) -> float:
    """The next number of one digit and zeros."""
    if value <= 0:
        return 0.0
    unit: float = 10.0 ** math.floor(math.log10(value))
    return math.ceil(value / unit) * unit
