"""Copies of the bundled model that do not say what their MTP layer reads."""

import json
import shutil
from pathlib import Path

import mlx.core as mx

from mlx_qwen.demo import DEMO_FOLDER
from tests.support.mlx_folders import companion_arrays, main_arrays


def silent_copy(folder: Path, *, reads: str) -> Path:
    """The bundled model without its marker's word, its MTP layer given a norm that suits normed or residual states.

    Norms being blind to scale, behind a factor f they do to a state what f times their factor does without it.
    """
    shutil.copytree(DEMO_FOLDER, folder)
    config = json.loads((folder / "config.json").read_text())
    config["mlx_qwen"].pop("mtp_reads", None)
    (folder / "config.json").write_text(json.dumps(config))
    if reads == "residual":
        weights, name = dict(companion_arrays(folder)), "language_model.model.norm.weight"
        final = weights[name] if name in weights else main_arrays(folder)[name]
        weights["mtp.pre_fc_norm_hidden.weight"] = weights["mtp.pre_fc_norm_hidden.weight"] * final
        mx.eval(weights)
        mx.save_safetensors(str(folder / "mlx-qwen.safetensors"), weights, metadata={"format": "mlx"})
    return folder
