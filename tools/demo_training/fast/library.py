"""Compiles the C++ of this folder once and calls it with the addresses of tensors."""

import ctypes
import hashlib
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch

ARM = platform.machine() in ("arm64", "aarch64")
TUNED = ("-mcpu=native",) if ARM else ("-march=native", "-mprefer-vector-width=512")
FLAGS = ("-std=c++17", "-O3", "-ffast-math", "-fPIC", *TUNED)
NAMES = {torch.float32: "float", torch.bfloat16: "bf16"}
Argument = torch.Tensor | int | float | None


def call(name: str, dtype: torch.dtype, *arguments: Argument) -> float:
    """Runs the kernel `name` for rows of `dtype`, float32 or bfloat16; only `cross_entropy` returns a number."""
    function = _library()[f"{name}_{NAMES[dtype]}"]
    function.restype = ctypes.c_float
    return float(function(*map(_converted, arguments)))


def _converted(argument: Argument) -> ctypes.c_void_p | ctypes.c_int64 | ctypes.c_float:
    if isinstance(argument, torch.Tensor):
        if not argument.is_contiguous():
            raise ValueError(f"expected a contiguous tensor, found strides {argument.stride()} for {argument.shape}")
        return ctypes.c_void_p(argument.data_ptr())
    if isinstance(argument, float):
        return ctypes.c_float(argument)
    return ctypes.c_int64(argument) if argument is not None else ctypes.c_void_p(None)


@cache
def _library() -> ctypes.CDLL:
    here = Path(__file__).parent
    sources = sorted(here.glob("*.cpp"))
    text = b"".join(path.read_bytes() for path in (*sources, *sorted(here.glob("*.h"))))
    target = Path(tempfile.gettempdir()) / f"demo_training_{hashlib.sha256(text).hexdigest()[:16]}.so"
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            _compile(sources, Path(folder) / target.name)
            (Path(folder) / target.name).replace(target)
    return ctypes.CDLL(str(target))


def _compile(sources: list[Path], target: Path) -> None:
    compiler = shutil.which("g++")
    if compiler is None:
        raise RuntimeError("training the demo needs g++ on the PATH, found none: install it, for example as `g++`")
    objects = [target.with_name(source.stem + ".o") for source in sources]
    for source, compiled in zip(sources, objects, strict=True):
        subprocess.run([compiler, *FLAGS, "-c", "-o", compiled, source], check=True)
    # Linked with -ffast-math, a library would change how the whole process treats subnormal numbers.
    subprocess.run([compiler, "-shared", "-o", target, *objects], check=True)
