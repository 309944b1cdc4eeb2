"""The demo as a Hugging Face folder: what the real releases hold, made from a training model."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from mlx_qwen.checkpoint import mtp_reads
from mlx_qwen.checkpoint.layout import FORMAT_KEY, FORMAT_VERSION
from tools.demo_training.architecture import demo_config
from tools.demo_training.model import DemoModel
from tools.demo_training.processing import write_processor_files
from tools.demo_training.tokenizer import END_OF_TURN, token_id

KEPT_IN_FLOAT32 = ("linear_attn.A_log", "linear_attn.norm.weight")


def new_model(dtype: torch.dtype = torch.bfloat16) -> DemoModel:
    """An untrained demo that computes in `dtype`, with the ids of the demo's tokenizer."""
    names = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>", END_OF_TURN)
    return DemoModel(demo_config(*map(token_id, names)), dtype)


def tensors(model: DemoModel) -> dict[str, torch.Tensor]:
    """The weights by their published names: bfloat16, but float32 where the releases are."""
    named = model.base.state_dict() | {f"mtp.{name}": value for name, value in model.mtp.state_dict().items()}
    return {
        name: value.detach().to(torch.float32 if name.endswith(KEPT_IN_FLOAT32) else torch.bfloat16).clone()
        for name, value in named.items()
        if name != "lm_head.weight"
    }


def read_folder(folder: Path, dtype: torch.dtype = torch.bfloat16) -> DemoModel:
    """The model that `write_folder` wrote, or `tools.export_demo`; it computes in `dtype`."""
    model = new_model(dtype)
    stored = load_file(folder / "model.safetensors")
    mtp = {name: stored.pop(name) for name in list(stored) if name.startswith("mtp.")}
    model.mtp.load_state_dict({name.removeprefix("mtp."): value for name, value in mtp.items()})
    model.base.load_state_dict({**stored, "lm_head.weight": stored["model.language_model.embed_tokens.weight"]})
    return model


def write_folder(model: DemoModel, folder: Path) -> None:
    """Writes a folder that transformers and the converter load; each file of the model is replaced in one go, so that
    a reader never sees half of one."""
    write_processor_files(folder)
    # Training gives the MTP layer the states behind the final norm; transformers ignores what it does not know.
    marker = {FORMAT_KEY: {"format": FORMAT_VERSION, mtp_reads.KEY: "normed"}}
    config = model.config.to_diff_dict() | {"architectures": [type(model.base).__name__], "dtype": "bfloat16"} | marker
    _replace(folder / "config.json", lambda path: path.write_text(json.dumps(config, indent=2) + "\n"))
    _replace(folder / "model.safetensors", lambda path: save_file(tensors(model), path, metadata={"format": "pt"}))


def _replace(target: Path, write: Callable[[Path], object]) -> None:
    part = target.with_name(target.name + ".part")
    write(part)
    part.chmod(0o644)
    part.replace(target)
