"""The picture of a comparison of speed: prefill and decode side by side, each with a scale of its own."""

from collections.abc import Mapping
from pathlib import Path

from mlx_qwen.bench.speed import Bar, Speed
from mlx_qwen.canvas import FAINT, INK, RULE, Canvas
from mlx_qwen.errors import MLXQwenError

COLORS = ("#1d5a96", "#8fb8de", "#d9662b", "#3c9a5f")
_WIDTH, _HEIGHT, _MARGIN = 1000, 420, 36
_TOP, _BOTTOM = 120, 350
_FORMATS = (".png", ".webp", ".jpg", ".jpeg")

# Bars by size of prompt and runtime.
Panel = dict[str, dict[str, Bar]]


def check_plot(path: Path) -> None:
    """Raise MLXQwenError for a file name that does not end as pictures do."""
    if path.suffix.lower() not in _FORMATS:
        raise MLXQwenError(f"{path.name} does not end in {', '.join(_FORMATS)}. Choose another name for the plot.")


def save_plot(speed: Speed, path: Path, title: str, note: str) -> None:
    """Draw medians as bars and ranges as lines over them into a picture file; see `check_plot`."""
    check_plot(path)
    colors = dict(zip((name for name in speed.turns if name not in speed.failures), COLORS, strict=False))
    canvas = Canvas(_WIDTH, _HEIGHT)
    canvas.text((_MARGIN, 34), title, size=18)
    canvas.text((_MARGIN, 56), note, color=FAINT)
    _legend(canvas, colors)
    width = (_WIDTH - 3 * _MARGIN) / 2
    for index, (phase, panel) in enumerate(_panels(speed).items()):
        left = _MARGIN + index * (width + _MARGIN)
        canvas.text((left, 96), f"{phase.capitalize()}, tokens a second", size=12)
        _draw_panel(canvas, (left, width), panel, colors, f"{phase} {'of' if phase == 'prefill' else 'after'}")
    canvas.save(path)


def _panels(speed: Speed) -> dict[str, Panel]:
    panels: dict[str, Panel] = {}
    for name in speed.turns:
        for what, bar in speed.spread(name).items():
            phase, _, size = what.split(" ")
            panels.setdefault(phase, {}).setdefault(size, {})[name] = bar
    return panels


def _legend(canvas: Canvas, colors: Mapping[str, str]) -> None:
    x = _WIDTH - _MARGIN - sum(canvas.width_of(name, 11) + 36 for name in colors)
    for name, color in colors.items():
        canvas.box((x, 28), (12, 12), color, radius=2)
        canvas.text((x + 18, 34), name)
        x += canvas.width_of(name, 11) + 36


def _draw_panel(
    canvas: Canvas, across: tuple[float, float], panel: Panel, colors: Mapping[str, str], label: str
) -> None:
    left, width = across
    most = max(bar.high for group in panel.values() for bar in group.values())
    group_width = width / len(panel)
    bar_width = min(46.0, 0.8 * group_width / len(colors))
    canvas.line([(left, _BOTTOM), (left + width, _BOTTOM)], RULE, width=1.5)
    for place, (size, group) in enumerate(panel.items()):
        centre = left + (place + 0.5) * group_width
        canvas.text((centre, _BOTTOM + 16), f"{label} {size}", color=FAINT, anchor="mm")
        for index, (name, color) in enumerate(colors.items()):
            if name in group:
                x = centre + (index - len(colors) / 2) * bar_width
                _draw_bar(canvas, (x, bar_width - 4), group[name], most, color)


def _draw_bar(canvas: Canvas, across: tuple[float, float], bar: Bar, most: float, color: str) -> None:
    x, width = across
    low, height, high = ((_BOTTOM - _TOP) * value / most for value in (bar.low, bar.value, bar.high))
    canvas.box((x, _BOTTOM - height), (width, height), color, radius=1)
    canvas.line([(x + width / 2, _BOTTOM - low), (x + width / 2, _BOTTOM - high)], INK, width=1.2)
    canvas.text((x + width / 2, _BOTTOM - high - 8), f"{bar.value:,.0f}", size=9, anchor="mm")
