"""Lets each kernel prove itself on this machine, at a model's own sizes, and remembers what was found."""

import hashlib
import os
import platform
import sys
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

import mlx.core as mx

import metal_kernels
from metal_kernels import machine_chooses
from metal_kernels._choices import Choices, choices, choose, chosen
from metal_kernels.moe_dispatch import ExpertWeights
from mlx_qwen.model.mlp import MLP, SparseMoE
from mlx_qwen.model.qwen import Model
from mlx_qwen.model.rope import rotary
from mlx_qwen.remembered import recall, remember
from mlx_qwen.status_line import StatusLine
from mlx_qwen.version import installed

if TYPE_CHECKING:
    from metal_kernels.tuning import Clock, Row, Tuned
    from metal_kernels.tuning_cases import ModelSizes

TUNE = "MLX_QWEN_TUNE"
_FOLDER = "kernels"


def settle_kernels(model: Model) -> None:
    """Launch kernels as suits this machine, which is found out when it first meets a model of these sizes.

    Nothing happens unless `MLX_QWEN_KERNELS` leaves the choice (`auto`) to a machine with a Metal GPU, and where
    `MLX_QWEN_TUNE` is 0.
    """
    if not machine_chooses() or os.environ.get(TUNE) == "0":
        return
    known = recalled(model)
    if known is None:
        known = prove(model).choices
    choose(replace(known, left_out={**choices().left_out, **known.left_out}))


def prove(model: Model, *, clock: "Clock | None" = None) -> "Tuned":
    """Measure every kernel at the model's sizes, say which are left out and why, and remember the choices."""
    from metal_kernels.tuning import seconds_of, tune

    line, clock = StatusLine(), clock or seconds_of

    def show(done: int, of: int) -> None:
        line.show(f"Trying the kernels on this machine, once: {done} of {of}")

    tuned = tune(sizes_of(model), clock=clock, report=show)
    if model.share.count == 1:  # others would have to take the same steps at the same time
        tuned = _with_replay(model, tuned, clock)
    line.finish(keep=False)
    _note(model, tuned.choices, tuned.choices.left_out)
    return tuned


def leave_out_failing(model: Model) -> bool:
    """After an error in the midst of an answer: leave out the kernels that fail now; whether there are any."""
    if not machine_chooses():
        return False
    from metal_kernels.tuning import failing, without

    sizes = sizes_of(model)
    failed = failing(sizes)
    if not failed:
        return False
    choose(without(choices(), failed, sizes.widest_key))
    _note(model, choices(), failed)
    return True


def recalled(model: Model) -> Choices | None:
    """What was found out before about this machine, these sizes, and these very kernels; None when nothing was."""
    found, default = recall(_name(model)), Choices()
    kinds = {field.name: type(getattr(default, field.name)) for field in fields(Choices)}
    if found.keys() != kinds.keys() or any(type(found[name]) is not kind for name, kind in kinds.items()):
        return None
    texts = isinstance(found["left_out"], Mapping) and all(isinstance(why, str) for why in found["left_out"].values())
    counts = all(type(count) is int and count > 0 for count in found["most_threads"].values())
    return Choices(**found) if texts and counts else None


def sizes_of(model: Model) -> "ModelSizes":
    """The sizes that shape the kernels of a model's layers."""
    from metal_kernels.calls import AttentionSizes, ExpertSizes
    from metal_kernels.tuning_cases import ModelSizes

    text = model.share.text
    linear = [layer for layer in model.layers if layer.is_linear]
    sparse = next((layer.mlp for layer in model.layers if isinstance(layer.mlp, SparseMoE)), None)
    moe, experts = text.moe, None
    if sparse is not None and moe is not None:
        matrix = sparse.weights.gate_up
        experts = ExpertSizes(
            moe.num_experts,
            moe.num_experts_per_tok,
            moe.moe_intermediate_size,
            moe.shared_expert_intermediate_size,
            *_packing(matrix),
        )
    dense = next((layer.mlp for layer in model.layers if isinstance(layer.mlp, MLP)), None)
    return ModelSizes(
        model.dtype,
        text.hidden_size,
        linear[0].linear_attn.heads if linear else None,
        text.linear_conv_kernel_dim,
        AttentionSizes(
            text.num_attention_heads, text.num_key_value_heads, text.head_dim, rotary(text.head_dim, text.rope).dims
        )
        if len(linear) < len(model.layers)
        else None,
        experts,
        None if dense is None else text.intermediate_size,
        (0, 64, "affine") if dense is None else _packing(dense.gate_up[0]),
        text.vocab_size,
    )


def _packing(matrix: ExpertWeights) -> tuple[int, int, str]:
    """Bits, group size and mode; 0 bits are a dense matrix."""
    return (0, 64, "affine") if matrix.scales is None else (matrix.bits, matrix.group_size, matrix.mode)


def machine() -> str:
    """Chip, system, MLX and the kernels' own text: what a measurement holds for."""
    chip = str(mx.device_info().get("device_name", platform.machine()))
    system = f"macOS {platform.mac_ver()[0]}" if sys.platform == "darwin" else platform.platform()
    return f"{chip}, {system}, MLX {installed('mlx')}, kernels {_source_hash()}"


def table(rows: "tuple[Row, ...]") -> str:
    """What was measured, a line a kernel."""
    lines = [f"{'kernel':<34}{'runs as':<34}{'difference':<12}{'kernel':<12}plain MLX"]
    for row in rows:
        error = "" if row.error is None else f"{row.error:.1e}"
        times = ["" if t is None else f"{t:.3f} ms" for t in (row.kernel_ms, row.reference_ms)]
        runs = f"left out: {row.left_out}" if row.left_out else row.variant
        lines.append(f"{row.kernel:<34}{runs:<34}{error:<12}{times[0]:<12}{times[1]}".rstrip())
    return "\n".join(lines)


def _with_replay(model: Model, tuned: "Tuned", clock: "Clock") -> "Tuned":
    """Whether decoding by replayed graphs is the quicker way."""
    from metal_kernels.tuning import Row

    with chosen(tuned.choices):
        state = model.step(mx.array([[0, 1, 2, 3]]), model.make_cache().state).state
        mx.eval(state.arrays())
    took = {}
    for replay in (True, False):
        with chosen(replace(tuned.choices, replay=replay)):
            label = "a decoded token" + (", replayed" if replay else "")
            took[replay] = clock(label, "kernel", lambda: [model.step(mx.array([[4]]), state).hidden])
    replays = took[True] <= took[False]
    row = Row("decoding", "replayed graphs" if replays else "layer by layer", kernel_ms=1e3 * min(took.values()))
    return replace(tuned, choices=replace(tuned.choices, replay=replays), rows=(*tuned.rows, row))


def _note(model: Model, made: Choices, left_out: Mapping[str, str]) -> None:
    """Remember the choices, and say which kernels were left out just now."""
    for kernel, why in left_out.items():
        line = f"mlx-qwen: the kernel {kernel} is left out on this machine ({why}); plain MLX does its work."
        print(line, file=sys.stderr)
    remember(_name(model), asdict(made))


def _name(model: Model) -> str:
    key = f"{machine()}, {sizes_of(model)}"
    return f"{_FOLDER}/{hashlib.sha256(key.encode()).hexdigest()[:24]}"


def _source_hash() -> str:
    digest = hashlib.sha256()
    for file in sorted(Path(metal_kernels.__file__).parent.rglob("*")):
        if file.suffix in (".metal", ".h", ".py"):
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]
