"""torchvision for transformers' image and video processors, also beside a torch that it was not compiled for."""

import sys
from importlib.util import find_spec
from pathlib import Path

# Not among the other packages: transformers imports it wherever it finds it, and fails where the operators are missing.
FOLDER = Path(sys.prefix) / "reference"
_declared: list[object] = []


def provide_torchvision() -> None:
    """Lets transformers find torchvision where `make test` puts it; without it, nothing happens.

    A wheel for CUDA loads no compiled operators beside a torch for CPUs, and its import asks for two of them by name.
    They are declared then, without bodies: resizing and normalizing use neither.
    """
    sys.path.append(str(FOLDER))
    if find_spec("torchvision") is None:
        return
    try:
        _import()
    except (ImportError, OSError):
        # Of another torch or system altogether: as if it were not there.
        sys.path.remove(str(FOLDER))


def _import() -> None:
    try:
        import torchvision
    except RuntimeError:
        _declare("nms", "qnms")
        import torchvision  # noqa: F401


def _declare(*names: str) -> None:
    from torch.library import Library

    library = Library("torchvision", "FRAGMENT")
    for name in names:
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _declared.append(library)  # declarations end with the object
