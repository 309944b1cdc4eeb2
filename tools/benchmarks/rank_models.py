"""The models that `ranks` divides: one of each kind with random weights, and the bundled one with a picture."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_qwen.checkpoint.released import reduced
from mlx_qwen.config import ModelConfig
from mlx_qwen.convert import convert
from mlx_qwen.demo import demo_folder
from mlx_qwen.demo.prompts import question
from mlx_qwen.demo.tasks import TASKS, draw
from mlx_qwen.options import GenerationOptions
from mlx_qwen.prompt import Processor
from mlx_qwen.prompt.inputs import prompt_inputs
from tools.benchmarks.synthetic import write_random_checkpoint

PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {"quantize": False, "dtype": "float32"},
    "bf16": {"quantize": False},
    "4 bits": {"bits": 4, "group_size": 32, "dtype": "float32"},
}
_ROWS, _PROMPT_TOKENS, _LAYERS = 2, 32, 4
# 8 ranks divide all of it; mlx-lm repeats no key heads of linear attention.
_SMALL = {
    "hidden_size": 128, "intermediate_size": 384, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 32,
    "linear_num_key_heads": 8, "linear_num_value_heads": 16, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "vocab_size": 1024,
}  # fmt: skip
_EXPERTS = {
    "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 128, "shared_expert_intermediate_size": 128,
}  # fmt: skip
_NEXT = {
    "model_type": "qwen3_next", "num_hidden_layers": _LAYERS, "full_attention_interval": 4, "rope_theta": 10_000_000,
    "partial_rotary_factor": 0.25, "max_position_embeddings": 4096, "linear_conv_kernel_dim": 4, "rms_norm_eps": 1e-6,
    "hidden_act": "silu", "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [],
    "tie_word_embeddings": False, "dtype": "bfloat16",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Subject:
    """A checkpoint to divide, and a file with the prompt that it gets: `ids`, and pixels where there is a picture."""

    name: str
    source: Path
    prompt: Path

    def converted(self, precision: str, folder: Path) -> Path:
        """The checkpoint in a precision of `PRECISIONS`, in a folder below `folder`."""
        model = folder / f"{self.name}-{precision}".replace(" ", "-")
        convert(self.source, model, progress=False, **PRECISIONS[precision])
        return model


def random_subject(name: str, config: ModelConfig, folder: Path) -> Subject:
    """A model of `config` with random weights and a few random prompts."""
    source, prompt = folder / name / "source", folder / name / "prompt.npz"
    write_random_checkpoint(config, source)
    _decide(source)
    ids = np.random.default_rng(0).integers(0, config.text.vocab_size, (_ROWS, _PROMPT_TOKENS))
    np.savez(prompt, ids=ids)
    return Subject(name, source, prompt)


def _decide(source: Path) -> None:
    """Let routers prefer some experts clearly, as trained ones do: ties would turn every rounding into an error."""
    for file in source.glob("*.safetensors"):
        tensors: dict[str, mx.array] = mx.load(str(file))  # type: ignore[assignment]
        scaled = {name: 32 * x if name.endswith("mlp.gate.weight") else x for name, x in tensors.items()}
        mx.eval(scaled)
        mx.save_safetensors(str(file), scaled, metadata={"format": "pt"})


def _bundled(name: str, folder: Path) -> Subject:
    """The bundled model, asked about one drawn picture, which it reasons about."""
    example = draw(TASKS["picture"], random.Random(0), held_out=True)
    source = demo_folder()
    processor = Processor.from_directory(source, ModelConfig.from_directory(source))
    read = prompt_inputs(processor, question(example), GenerationOptions(enable_thinking=True))
    assert read.images is not None, "the question is about a picture"
    prompt = folder / f"{name}.npz"
    pixels, grids = np.array(read.images.pixel_values), np.array(read.images.grid_thw)
    np.savez(prompt, ids=np.array([read.ids]), pixel_values=pixels, image_grid_thw=grids)
    return Subject(name, source, prompt)


def _dense(name: str, folder: Path) -> Subject:
    return random_subject(name, reduced("0.8B", num_layers=_LAYERS, changes=_SMALL), folder)


def _moe(name: str, folder: Path) -> Subject:
    return random_subject(name, reduced("35B-A3B", num_layers=_LAYERS, changes=_SMALL | _EXPERTS), folder)


def _next(name: str, folder: Path) -> Subject:
    return random_subject(name, ModelConfig.from_dict(_SMALL | _EXPERTS | _NEXT), folder)


KINDS: dict[str, Callable[[str, Path], Subject]] = {
    "dense": _dense,
    "moe": _moe,
    "next": _next,
    "bundled": _bundled,
}
