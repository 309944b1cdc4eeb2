"""Which of the model's states the MTP layer of a checkpoint reads: what the checkpoint says, and what was remembered.

Released heads read the state behind the model's final norm (vLLM's `qwen3_5_mtp.py`; llama.cpp, pull request 24025),
but no file of theirs says so, and a layer that was trained otherwise drafts fluently and badly.
"""

import hashlib
import json
from pathlib import Path
from typing import Literal, get_args

import mlx.core as mx
import numpy as np

from mlx_qwen.checkpoint.layout import FORMAT_KEY, Plan
from mlx_qwen.config import ModelConfig
from mlx_qwen.remembered import recall, remember

# The state behind the final norm, or the residual sum before it.
MTPReads = Literal["normed", "residual"]
KEY = "mtp_reads"
WORDS = " or ".join(repr(word) for word in get_args(MTPReads))
# The norm over the states of the one layer that is known to read residual sums: that of the demo which came with the
# versions before the marker. Every conversion keeps it exactly.
_FORMER_NORM, _FORMER_SHAPE = "mtp.pre_fc_norm_hidden.weight", (128,)
_FORMER_SHA256 = "31dfeb0ccac658a87bb2fce4cc2959bb0c32118a7f30281c7037d0010ee5674c"


def known(word: object) -> MTPReads | None:
    """The word, if it is one that this version knows."""
    return next((reads for reads in get_args(MTPReads) if reads == word), None)


def marked(config: ModelConfig) -> object | None:
    """What the marker in config.json says, which may be a word that this version does not know; None if nothing."""
    marker = config.raw.get(FORMAT_KEY)
    return marker.get(KEY) if isinstance(marker, dict) else None


def stated(config: ModelConfig, plan: Plan) -> object | None:
    """As `marked`; where the marker is silent, what the layer itself tells: the demo's of earlier versions is known."""
    word = marked(config)
    return "residual" if word is None and _is_former_demo(plan) else word


def identity(folder: Path, config: ModelConfig) -> str:
    """SHA-256 of the config and of the weight files' names, sizes and times of their last change."""
    stats = ((file.name, file.stat()) for file in sorted(folder.glob("*.safetensors")))
    lines = [
        json.dumps(config.raw, sort_keys=True),
        *(f"{name} {stat.st_size} {stat.st_mtime_ns}" for name, stat in stats),
    ]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def recalled(checkpoint: str) -> MTPReads | None:
    """What was found out about the checkpoint of this `identity`, if anything."""
    return known(recall(_name(checkpoint)).get("reads"))


def keep(checkpoint: str, reads: MTPReads, likelihoods: dict[str, float]) -> None:
    """Remember what was found out, where that is possible, with the likelihoods that tell it."""
    remember(_name(checkpoint), {"reads": reads, **likelihoods})


def _name(checkpoint: str) -> str:
    return f"mtp/{checkpoint}"


def _is_former_demo(plan: Plan) -> bool:
    target = next((target for target in plan.targets if target.spec.name == _FORMER_NORM), None)
    if target is None or target.spec.shape != _FORMER_SHAPE:
        return False
    factors = target.arrange(target.sources[0].tensor.read()).astype(mx.float32)
    return hashlib.sha256(np.array(factors).tobytes()).hexdigest() == _FORMER_SHA256
