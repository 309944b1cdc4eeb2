"""The `config.json` of a converted checkpoint, which mlx-lm, mlx-vlm and this package read alike."""

from dataclasses import fields

from mlx_qwen.checkpoint import mtp_reads
from mlx_qwen.checkpoint.layout import FORMAT_KEY, FORMAT_VERSION, Quantization
from mlx_qwen.checkpoint.names import MTP_PREFIX
from mlx_qwen.config import Json, ModelConfig, TextConfig

from ..outputs import Outputs

_TEXT_ONLY = {"qwen3_5_text": "qwen3_5", "qwen3_5_moe_text": "qwen3_5_moe"}
_TOP_LEVEL = ("architectures", "transformers_version", "eos_token_id")
_STALE = ("quantization", "quantization_config", "_name_or_path", FORMAT_KEY)


def converted_config(
    config: ModelConfig, outputs: Outputs, default: Quantization | None, companion_files: list[str], *, has_vision: bool
) -> Json:
    """The source's config with the settings of every packed module and with what other readers take from defaults.

    mlx-lm knows neither the `…_text` model types nor `layer_types`, and mlx-vlm no rotary fields outside
    `rope_parameters`, so all of it is spelled out.
    """
    raw = {key: value for key, value in config.raw.items() if key not in _STALE}
    if not has_vision:
        raw.pop("vision_config", None)
    source = raw.pop("text_config", raw)
    text = {**source, **_explicit(config.text, source), "dtype": outputs.dtype}
    for key in (*_STALE, "torch_dtype", "rope_scaling"):
        text.pop(key, None)
    if config.is_next:
        written = {**text, **_next_fields(config.text)}
    else:
        nested = "text_config" in config.raw
        top = raw if nested else {key: raw[key] for key in _TOP_LEVEL if key in raw}
        model_type = _TEXT_ONLY.get(config.model_type, config.model_type)
        inner = {key: value for key, value in text.items() if nested or key not in _TOP_LEVEL[:2]}
        written = {**top, "model_type": model_type, "text_config": {**inner, "model_type": f"{model_type}_text"}}
    written["tie_word_embeddings"] = config.text.tie_word_embeddings
    if default is not None:
        written["quantization"] = written["quantization_config"] = _quantization(outputs, default)
    marker: Json = {"format": FORMAT_VERSION, "norms": "shifted", "companion": companion_files}
    # Only what the source itself says: a guess would keep the runtime from finding out.
    reads = mtp_reads.marked(config)
    if reads is not None and any(output.name.startswith(MTP_PREFIX) for output in outputs.all):
        marker[mtp_reads.KEY] = reads
    return dict(sorted({**written, FORMAT_KEY: marker}.items()))


def _quantization(outputs: Outputs, default: Quantization) -> Json:
    settings: Json = _as_json(default)
    for output in outputs.all:
        if output.quantization not in (None, default):
            settings[output.name.removesuffix(".weight")] = _as_json(output.quantization)
    return settings


def _as_json(quantization: Quantization) -> Json:
    return {"group_size": quantization.group_size, "bits": quantization.bits, "mode": quantization.mode}


def _explicit(text: TextConfig, source: Json) -> Json:
    rope: Json = {
        "rope_type": "default",
        "rope_theta": text.rope.theta,
        "partial_rotary_factor": text.rope.partial_rotary_factor,
    }
    if text.rope.mrope_section is not None:
        rope |= {"mrope_section": list(text.rope.mrope_section), "mrope_interleaved": True}
    yarn = text.rope.yarn
    if yarn is not None:
        stated = {field.name: getattr(yarn, field.name) for field in fields(yarn) if field.name != "original"}
        rope |= {"rope_type": "yarn", "original_max_position_embeddings": yarn.original, **stated}
    explicit = {
        "head_dim": text.head_dim,
        "layer_types": list(text.layer_types),
        "max_position_embeddings": text.max_position_embeddings,
        "rms_norm_eps": text.rms_norm_eps,
        "rope_parameters": rope,
        "tie_word_embeddings": text.tie_word_embeddings,
    }
    interval = next((i for i, kind in enumerate(text.layer_types, 1) if kind == "full_attention"), None)
    return explicit if interval is None else {**explicit, "full_attention_interval": interval}


def _next_fields(text: TextConfig) -> Json:
    assert text.moe is not None, "qwen3_next always has experts"
    sparse = text.sparse_layers
    return {
        "rope_theta": text.rope.theta,
        "partial_rotary_factor": text.rope.partial_rotary_factor,
        "norm_topk_prob": text.moe.norm_topk_prob,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [i for i, is_sparse in enumerate(sparse) if not is_sparse],
        "intermediate_size": text.intermediate_size,
    }
