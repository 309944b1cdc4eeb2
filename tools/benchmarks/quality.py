"""What precision costs: perplexity and agreement of conversions with the fp32 model, beside mlx-lm's conversions."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_qwen.bench.table import Table
from mlx_qwen.bench.timing import OURS, PEER
from mlx_qwen.checkpoint.layout import FORMAT_KEY
from mlx_qwen.config import ModelConfig
from mlx_qwen.convert import convert
from mlx_qwen.loading import load_model
from mlx_qwen.prompt import Processor

_WINDOW = 192
_PRECISIONS: dict[str, int | None] = {"bf16": None, "8 bits": 8, "4 bits": 4}
Logits = Callable[[npt.NDArray[np.int64]], npt.NDArray[np.float32]]


def bench_quality(folder: Path, text: Path, workdir: Path, *, windows: int = 8) -> Table:
    """Convert `folder` to bf16, 8 and 4 bits with both converters and compare them on a text.

    Perplexity and agreement of the most likely token are taken over windows of 192 tokens. The truth is transformers in
    fp32 where it is installed, with its bf16 as a further row, else our own fp32.
    """
    ids = Processor.from_directory(folder, ModelConfig.from_directory(folder)).encode(text.read_text(encoding="utf-8"))
    usable = min(windows, len(ids) // _WINDOW) * _WINDOW
    batch = np.array(ids[:usable], dtype=np.int64).reshape(-1, _WINDOW)
    truth, candidates = None, _candidates(folder, workdir)
    rows = []
    for name, model in candidates:
        logits = np.concatenate([model(row[None]) for row in batch])
        best = logits.argmax(axis=-1)
        truth = best if truth is None else truth
        rows.append((name, f"{perplexity(logits, batch):.3f}", f"{(best == truth).mean():.2%}"))
    note = f"{usable:,} tokens in windows of {_WINDOW}; agreement of the most likely token with the first row."
    return Table("Precision", note, ("model", "perplexity", "agreement"), rows)


def perplexity(logits: npt.NDArray[np.float32], ids: npt.NDArray[np.int64]) -> float:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    log_probabilities = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    chosen = np.take_along_axis(log_probabilities[:, :-1], ids[:, 1:, None], axis=-1)
    return float(np.exp(-chosen.mean()))


def _candidates(folder: Path, workdir: Path) -> Iterator[tuple[str, Logits]]:
    try:
        import transformers  # noqa: F401
    except ImportError:
        yield f"{OURS}, fp32", _ours(folder, mx.float32)
    else:
        yield "transformers, fp32", _transformers(folder, "float32")
        yield "transformers, bf16", _transformers(folder, "bfloat16")
    readable = readable_by_mlx_lm(folder, workdir)
    for name, bits in _PRECISIONS.items():
        ours, theirs = workdir / f"ours-{name}", workdir / f"mlx-lm-{name}"
        convert(folder, ours, bits=bits, quantize=bits is not None, dtype="bfloat16", progress=False)
        yield f"{OURS}, {name}", _ours(ours)
        from mlx_lm.convert import convert as mlx_lm_convert

        mlx_lm_convert(str(readable), str(theirs), quantize=bits is not None, q_bits=bits, dtype="bfloat16")
        yield f"{PEER}, {name}", _mlx_lm(theirs)


def _ours(folder: Path, dtype: mx.Dtype | None = None) -> Logits:
    model = load_model(folder, ModelConfig.from_directory(folder), dtype=dtype)
    return lambda ids: np.array(model(mx.array(ids)).astype(mx.float32))


def _mlx_lm(folder: Path) -> Logits:
    from mlx_lm.utils import load_model as mlx_lm_load

    model = mlx_lm_load(folder)[0]

    def logits(ids: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        with _experts_in_fp32_on_cpu():
            return np.array(model(mx.array(ids)).astype(mx.float32))

    return logits


@contextmanager
def _experts_in_fp32_on_cpu() -> Iterator[None]:
    """MLX's CPU backend gathers fp32 matrices only, which stops mlx-lm's bf16 experts there."""
    gather_mm = mx.gather_mm

    def upcast(a: mx.array, b: mx.array, **options: Any) -> mx.array:
        return gather_mm(a.astype(mx.float32), b.astype(mx.float32), **options).astype(a.dtype)

    if mx.default_device().type == mx.DeviceType.cpu:
        setattr(mx, "gather_mm", upcast)  # noqa: B010
    try:
        yield
    finally:
        setattr(mx, "gather_mm", gather_mm)  # noqa: B010


def _transformers(folder: Path, dtype: str) -> Logits:
    import torch
    import transformers

    name = json.loads((folder / "config.json").read_text(encoding="utf-8"))["architectures"][0]
    model: Any = getattr(transformers, name).from_pretrained(folder, dtype=getattr(torch, dtype)).eval()

    def logits(ids: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        with torch.no_grad():
            output: npt.NDArray[np.float32] = model(input_ids=torch.tensor(ids)).logits.float().numpy()
        return output

    return logits


def readable_by_mlx_lm(folder: Path, workdir: Path) -> Path:
    """The folder, or a copy that mlx-lm knows and converts to what any runtime reads.

    The copy has the model type of the whole model where that is the text's, and no word of a file that mlx-lm drops.
    """
    raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config = {name: value for name, value in raw.items() if name != FORMAT_KEY}
    config["model_type"] = raw["model_type"].removesuffix("_text")
    if config == raw:
        return folder
    copy = shutil.copytree(folder, workdir / "renamed", copy_function=shutil.copyfile)
    (copy / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return copy
