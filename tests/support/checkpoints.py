"""Small random checkpoints as transformers writes them: the input, and the reference, of most tests."""

import json
import os
from pathlib import Path
from typing import Literal

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

Kind = Literal["dense", "moe", "dense_vl", "moe_vl", "next"]
KINDS: tuple[Kind, ...] = ("dense", "moe", "dense_vl", "moe_vl", "next")

VOCAB_SIZE = 320
_TEXT = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_conv_kernel_dim": 4,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "eos_token_id": 0,
}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25}
_MROPE = {**_ROPE, "mrope_section": [2, 1, 1], "mrope_interleaved": True}
_EXPERTS = {
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
}
_VISION = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 2,
    "in_channels": 3,
    "patch_size": 4,
    "temporal_patch_size": 2,
    "spatial_merge_size": 2,
    "num_position_embeddings": 16,
    "out_hidden_size": 64,
}
_MEDIA_TOKENS = {
    "image_token_id": 300,
    "video_token_id": 301,
    "vision_start_token_id": 302,
    "vision_end_token_id": 303,
}


def tiny_checkpoint(
    path: Path,
    kind: Kind,
    *,
    layers: int = 4,
    interval: int = 4,
    first: int = 0,
    tied: bool = False,
    dtype: Literal["float32", "bfloat16"] = "float32",
    with_mtp: bool = False,
    fused_experts: bool = False,
    shard_size: str = "50GB",
    seed: int = 0,
) -> Path:
    """Write a random checkpoint of `kind` in Hugging Face layout to `path` and return `path`.

    Every `interval`-th of its `layers` is full attention; `first` is one of them, counted from 1, if it is given.
    Every parameter that transformers initialises to a constant (norms, A_log, dt_bias) is moved away from it. bfloat16
    checkpoints keep A_log and linear_attn.norm in float32, as the released ones do. `with_mtp` adds the official
    `mtp.*` tensors, with one tensor an expert. transformers saves the decoder's experts apart too; `fused_experts`
    stores them as the released Qwen3.5 checkpoints do. `shard_size` such as "100KB" makes several shards.
    """
    torch.manual_seed(seed)
    model = _build(kind, layers=layers, interval=interval, first=first, tied=tied, with_mtp=with_mtp)
    randomize(model, seed)
    for name, parameter in model.named_parameters():
        if dtype == "bfloat16" and not name.endswith(("A_log", "linear_attn.norm.weight")):
            parameter.data = parameter.data.to(torch.bfloat16)
    model.config.dtype = dtype
    model.save_pretrained(path, max_shard_size=shard_size)
    if fused_experts:
        _fuse_experts(path, model)
    if with_mtp:
        _append_mtp(path, sparse=kind in ("moe", "moe_vl", "next"), dtype=getattr(torch, dtype), seed=seed)
    return path


def reference_model(path: Path) -> nn.Module:
    """transformers' own model of the checkpoint at `path`, in float32 and evaluation mode."""
    name = json.loads((path / "config.json").read_text())["architectures"][0]
    model: nn.Module = getattr(transformers, name).from_pretrained(path, dtype=torch.float32)
    return model.eval()


def reference_logits(path: Path, input_ids: Tensor) -> Tensor:
    """Logits [B, T, V] in float32 of the checkpoint at `path` for `input_ids` [B, T]."""
    with torch.no_grad():
        logits: Tensor = reference_model(path)(input_ids=input_ids, use_cache=False).logits
    return logits


def stored_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of the folder's `*.safetensors` files by its stored name."""
    tensors: dict[str, Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def randomize(model: nn.Module, seed: int) -> None:
    """Redraw every parameter so that no two tensors, and no tensor and its initial value, could be confused."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        with torch.no_grad():
            if name.endswith("A_log"):
                parameter.copy_(torch.rand(parameter.shape, generator=generator).mul(7.5).add(0.5).log())
            elif name.endswith("dt_bias") or parameter.ndim == 1:
                parameter.add_(0.3 * noise)
            elif name.endswith("conv1d.weight"):
                parameter.copy_(0.3 * noise)
            elif name.endswith("embed_tokens.weight"):
                parameter.copy_(noise)
            else:
                fan_in = parameter.shape[-1] if parameter.ndim == 3 else parameter[0].numel()
                # Small steps along the residual stream: a chaotic network would turn every rounding into an error.
                small = any(part in name for part in ("out_proj", "o_proj", "down_proj"))
                parameter.copy_(noise * (0.3 if small else 1.0) / fan_in**0.5)


def _build(kind: Kind, *, layers: int, interval: int, first: int, tied: bool, with_mtp: bool) -> nn.Module:
    text = {**_TEXT, "num_hidden_layers": layers, "mtp_num_hidden_layers": int(with_mtp), "tie_word_embeddings": tied}
    text["layer_types"] = [
        "linear_attention" if (i - first) % interval else "full_attention" for i in range(1, layers + 1)
    ]
    if kind == "next":
        config = transformers.Qwen3NextConfig(**text, **_EXPERTS, norm_topk_prob=True, rope_parameters=_ROPE)
        return transformers.Qwen3NextForCausalLM(config)
    text["rope_parameters"] = _MROPE
    prefix = "Qwen3_5"
    if kind in ("moe", "moe_vl"):
        prefix = "Qwen3_5Moe"
        text |= _EXPERTS
    if kind in ("dense", "moe"):
        config = getattr(transformers, f"{prefix}TextConfig")(**text)
        model: nn.Module = getattr(transformers, f"{prefix}ForCausalLM")(config)
        return model
    config = getattr(transformers, f"{prefix}Config")(
        text_config=text, vision_config=_VISION, tie_word_embeddings=tied, **_MEDIA_TOKENS
    )
    return getattr(transformers, f"{prefix}ForConditionalGeneration")(config)  # type: ignore[no-any-return]


def _fuse_experts(path: Path, model: nn.Module) -> None:
    """Rewrite a single-file checkpoint with `experts.gate_up_proj` and `experts.down_proj`, as the model holds them."""
    file = path / "model.safetensors"
    tensors = {name: tensor for name, tensor in load_file(file).items() if ".mlp.experts." not in name}
    experts = {name: tensor for name, tensor in model.state_dict().items() if ".mlp.experts." in name}
    save_file(tensors | experts, file, metadata={"format": "pt"})


def _append_mtp(path: Path, *, sparse: bool, dtype: torch.dtype, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed + 1)
    tensors = {
        name: (torch.randn(shape, generator=generator) * (0.3 if len(shape) == 1 else shape[-1] ** -0.5)).to(dtype)
        for name, shape in mtp_shapes(sparse=sparse).items()
    }
    shard = "model-mtp.safetensors"
    save_file(tensors, path / shard, metadata={"format": "pt"})
    index_file = path / "model.safetensors.index.json"
    if index_file.exists():
        index = json.loads(index_file.read_text())
    else:
        stored = load_file(path / "model.safetensors")
        index = {"metadata": {}, "weight_map": dict.fromkeys(stored, "model.safetensors")}
    index["weight_map"] |= dict.fromkeys(tensors, shard)
    index_file.write_text(json.dumps(index))


def mtp_shapes(*, sparse: bool) -> dict[str, tuple[int, ...]]:
    """The official `mtp.*` names and their shapes at the tiny size."""
    hidden, heads, kv_heads, head_dim = 64, 4, 2, 32
    layer = "mtp.layers.0"
    shapes: dict[str, tuple[int, ...]] = {
        "mtp.fc.weight": (hidden, 2 * hidden),
        "mtp.norm.weight": (hidden,),
        "mtp.pre_fc_norm_embedding.weight": (hidden,),
        "mtp.pre_fc_norm_hidden.weight": (hidden,),
        f"{layer}.input_layernorm.weight": (hidden,),
        f"{layer}.post_attention_layernorm.weight": (hidden,),
        f"{layer}.self_attn.q_proj.weight": (2 * heads * head_dim, hidden),
        f"{layer}.self_attn.k_proj.weight": (kv_heads * head_dim, hidden),
        f"{layer}.self_attn.v_proj.weight": (kv_heads * head_dim, hidden),
        f"{layer}.self_attn.o_proj.weight": (hidden, heads * head_dim),
        f"{layer}.self_attn.q_norm.weight": (head_dim,),
        f"{layer}.self_attn.k_norm.weight": (head_dim,),
    }
    if not sparse:
        return shapes | _mlp_shapes(f"{layer}.mlp", hidden, 128)
    shapes |= {f"{layer}.mlp.gate.weight": (8, hidden), f"{layer}.mlp.shared_expert_gate.weight": (1, hidden)}
    shapes |= _mlp_shapes(f"{layer}.mlp.shared_expert", hidden, 64)
    for i in range(8):
        shapes |= _mlp_shapes(f"{layer}.mlp.experts.{i}", hidden, 64)
    return shapes


def _mlp_shapes(prefix: str, hidden: int, inner: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{prefix}.gate_proj.weight": (inner, hidden),
        f"{prefix}.up_proj.weight": (inner, hidden),
        f"{prefix}.down_proj.weight": (hidden, inner),
    }
