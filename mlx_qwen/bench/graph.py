"""Counts the launches in a graph: nodes that run a kernel on a GPU, and the copies that MLX makes before some."""

import io
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.lib.stride_tricks import as_strided

from mlx_qwen.bench.as_on_gpu import Launches

COPY = "copy of an input"
# Reshape copies what it cannot describe by strides; that is counted apart.
_VIEWS = frozenset(
    (
        *("AsStrided", "Broadcast", "Copy", "ExpandDims", "Flatten", "Reshape", "Slice", "Split", "Squeeze"),
        *("StopGradient", "Transpose", "Unflatten", "View"),
    )
)
_RESHAPES = frozenset(("ExpandDims", "Flatten", "Reshape", "Squeeze", "Unflatten"))
_MATMULS = frozenset(("GatherMM", "Matmul"))
_GATHERED = frozenset(("GatherMM", "GatherQMM"))
_NEED_ORDER = frozenset(("Convolution", "GatherQMM", "QuantizedMatmul", "Softmax"))
_STAND_IN = "Depends"
_NODE = re.compile(r'\{ (\d+) \[label ="([^"]+)"')
_EDGE = re.compile(r'^"([^"]+)" -> (\d+)$', re.MULTILINE)

Step = Callable[[], Sequence[mx.array]]
Layout = np.ndarray[tuple[int, ...], np.dtype[np.uint8]]


def count_nodes(step: Step, launches: Launches) -> Counter[str]:
    """Launches of the graph that `step` builds, by name, without copies of inputs; a fused group counts once."""
    text = io.StringIO()
    mx.export_to_dot(text, *step(), **{name: launch.marker for name, launch in launches.kinds.items()})
    dot = text.getvalue()
    kinds = {node: launches.kinds[tensor] for tensor, node in _EDGE.findall(dot) if tensor in launches.kinds}
    counted: Counter[str] = Counter()
    # Replays of one fused group share an identifier, so nodes are counted, not identifiers.
    for node, name in _NODE.findall(dot):
        if node in kinds:
            counted[kinds[node].name] += not kinds[node].only_copies
        elif name not in _VIEWS:
            counted[name] += 1
    return +counted


def count_copies(step: Step, launches: Launches) -> int:
    """Copies that MLX makes of inputs in the graph that `step` builds, since kernels need their elements in order."""
    events: list[dict[str, Any]] = []
    with _without_fusing():
        mx.export_function(events.append, lambda: list(step()))
    unordered_is_fine = {launch.marker.shape for launch in launches.kinds.values() if not launch.needs_order}
    layouts: dict[str, Layout] = {}
    copies = 0
    for event in events:
        if event["type"] == "constants":
            layouts |= {name: _in_order(array.shape) for name, array in event["constants"]}
        elif event["type"] == "primitive":
            shapes = [shape for _, shape, _ in event["inputs"]]
            inputs = [layouts[name] for name, _, _ in event["inputs"]]
            if event["name"] != _STAND_IN or unordered_is_fine.isdisjoint(shapes):
                copies += _copied(event["name"], inputs)
            outputs, copied = _outputs(event, inputs)
            copies += copied
            layouts |= {name: layout for (name, _, _), layout in zip(event["outputs"], outputs, strict=True)}
    return copies


@contextmanager
def _without_fusing() -> Iterator[None]:
    """Tracing does not know fused groups, and fused or not, they read any strides."""
    mx.disable_compile()
    try:
        yield
    finally:
        mx.enable_compile()


def _in_order(shape: Sequence[int]) -> Layout:
    """An array of one byte an element, in order, without the memory of its size."""
    strides = [int(np.prod(shape[i + 1 :], dtype=np.int64)) for i in range(len(shape))]
    return as_strided(np.zeros(1, np.uint8), tuple(shape), strides)


def _copied(primitive: str, inputs: list[Layout]) -> int:
    """How many of the inputs this primitive would copy."""
    if primitive in _GATHERED:
        inputs = inputs[:-2]  # The indices are read at any strides.
    if primitive in _MATMULS:
        return sum(not (x.flags.c_contiguous or x.swapaxes(-1, -2).flags.c_contiguous) for x in inputs)
    if primitive in _NEED_ORDER or primitive == _STAND_IN:
        return sum(not x.flags.c_contiguous for x in inputs)
    return 0


def _outputs(event: dict[str, Any], inputs: list[Layout]) -> tuple[list[Layout], int]:
    """Layouts of a primitive's outputs, and whether it had to copy to make a view of its input."""
    shapes = [shape for _, shape, _ in event["outputs"]]
    if event["name"] in _RESHAPES:
        try:
            return [np.reshape(inputs[0], shapes[0], copy=False)], 0
        except ValueError:
            return [_in_order(shapes[0])], 1
    return _views(event, inputs, shapes) or [_in_order(shape) for shape in shapes], 0


def _views(event: dict[str, Any], inputs: list[Layout], shapes: list[Sequence[int]]) -> list[Layout]:
    """Layouts of the outputs of a primitive that only looks at its input differently; none for any other."""
    match event["name"], event["arguments"]:
        case "Transpose", [axes]:
            return [inputs[0].transpose(axes)]
        case "Broadcast", _:
            return [np.broadcast_to(inputs[0], shapes[0])]
        case "Slice", bounds:
            return [inputs[0][tuple(map(slice, *bounds))]]
        case "Split", [indices, axis]:
            return np.split(inputs[0], indices, axis=axis)
    return []
