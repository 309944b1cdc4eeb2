"""The shipped demo as the Hugging Face folder it came from: `python -m tools.export_demo FOLDER`.

The weights are those of the bundled checkpoint to the last bit, by their published names and in their published layout,
for transformers and for every tool that reads it.
"""

import argparse
import json
import shutil
from pathlib import Path

import mlx.core as mx

from mlx_qwen.checkpoint import mtp_reads
from mlx_qwen.checkpoint.layout import FORMAT_KEY
from mlx_qwen.demo import demo_folder

# Config entries of the MLX checkpoint that transformers does not know.
_OURS = (FORMAT_KEY, "quantization", "quantization_config")
_ZERO_CENTRED = ("layernorm.weight", "_norm.weight", "pre_fc_norm_embedding.weight", "pre_fc_norm_hidden.weight")
_EXPERTS = "switch_mlp."


def export(source: Path, target: Path) -> None:
    """Writes an unquantized checkpoint of this project, with its MTP layer, into `target` in Hugging Face layout."""
    target.mkdir(parents=True, exist_ok=True)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    plain = {key: value for key, value in config.items() if key not in _OURS}
    marker = config[FORMAT_KEY]
    if mtp_reads.KEY in marker:
        plain[FORMAT_KEY] = {name: marker[name] for name in ("format", mtp_reads.KEY)}
    (target / "config.json").write_text(json.dumps(plain, indent=2) + "\n", encoding="utf-8")
    for file in (*source.glob("*token*.json"), *source.glob("*processor_config.json"), *source.glob("chat_template*")):
        shutil.copy(file, target / file.name)
    shutil.copy(source / "generation_config.json", target / "generation_config.json")
    mx.save_safetensors(str(target / "model.safetensors"), _published(_tensors(source)), metadata={"format": "pt"})


def _tensors(source: Path) -> dict[str, mx.array]:
    """Every tensor by its MLX name; the companion's exact norms take the place of the rounded ones."""
    found: dict[str, mx.array] = {}
    for file in ("model.safetensors", "mlx-qwen.safetensors"):
        loaded = mx.load(str(source / file))
        assert isinstance(loaded, dict), "a safetensors file loads as a dict"
        found |= loaded
    return found


def _published(tensors: dict[str, mx.array]) -> dict[str, mx.array]:
    published: dict[str, mx.array] = {}
    for name, value in tensors.items():
        if _EXPERTS in name:
            continue
        published[_name(name)] = _layout(name, value)
    for name in [name for name in tensors if name.endswith(f"{_EXPERTS}gate_proj.weight")]:
        base, fused = name.removesuffix("gate_proj.weight"), _name(name).split(_EXPERTS)[0] + "experts."
        both = [tensors[f"{base}{part}_proj.weight"] for part in ("gate", "up")]
        published[f"{fused}gate_up_proj"] = mx.concatenate(both, axis=1)
        published[f"{fused}down_proj"] = tensors[f"{base}down_proj.weight"]
    return published


def _name(name: str) -> str:
    name = name.replace("language_model.model.", "model.language_model.", 1)
    return name.replace("vision_tower.", "model.visual.", 1)


def _layout(name: str, value: mx.array) -> mx.array:
    if name.endswith("conv1d.weight"):
        return value.transpose(0, 2, 1)
    if name.endswith("patch_embed.proj.weight"):
        return value.transpose(0, 4, 1, 2, 3)
    if name.startswith("vision_tower.") or name.endswith("linear_attn.norm.weight"):
        return value
    if name.endswith(_ZERO_CENTRED) or name in ("language_model.model.norm.weight", "mtp.norm.weight"):
        return (value - 1).astype(mx.bfloat16)
    return value


def main() -> None:
    """Export the bundled checkpoint into the folder named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    export(demo_folder(), parser.parse_args().folder)


if __name__ == "__main__":
    main()
