"""What an error in each kind of matrix costs a trained model, from which the weights of kinds follow."""

import re
import shutil
from collections.abc import Mapping
from pathlib import Path

from mlx_qwen.bench.table import Table
from mlx_qwen.checkpoint.layout import Plan, plan_checkpoint
from mlx_qwen.checkpoint.shards import checkpoint_tensors
from mlx_qwen.config import ModelConfig
from mlx_qwen.convert import convert
from mlx_qwen.convert.choices.sensitivity import KIND_WEIGHTS, harm_weights, measure
from mlx_qwen.convert.recipes.kinds import Kind, kind_of
from mlx_qwen.convert.recipes.precisions import precision
from tools.benchmarks.recipes import Judge, halved

BITS = 4
_JUDGED = tuple(kind for kind in Kind if kind.is_matrix and kind not in (Kind.ROUTER, Kind.MTP))


def bench_kinds(folder: Path, text: Path, workdir: Path) -> Table:
    """The divergence of `folder` from itself on `text` when the matrices of one kind alone have 4 bits.

    The weight of a kind is that divergence for each unit of its matrices' squared relative errors, beside that of
    experts, or of MLPs where there are none. Raises MLXQwenError when the text is too short.
    """
    found = kind_weights(folder, text, workdir)
    rows = [(kind.value, f"{weight:.2f}") for kind, weight in found.items()]
    return Table("Weights of kinds", f"of {folder.name}, beside one of its experts", ("kind", "weight"), rows)


def kind_weights(folder: Path, text: Path, workdir: Path) -> dict[Kind, float]:
    """The weight of each kind of matrix that the model has, that of embedding and head for each of its layers."""
    judge = Judge.of(folder, halved(text)[1])
    plan = plan_checkpoint(ModelConfig.from_directory(folder), checkpoint_tensors(folder))
    targets: dict[Kind, list[str]] = {}
    for target in plan.targets:
        if (kind := kind_of(target.spec)) in _JUDGED:
            targets.setdefault(kind, []).append(target.spec.name)
    errors = _squared_errors(plan)
    harms = {}
    for kind, names in targets.items():
        others: Mapping[str, int | str] = {rf"^(?!({'|'.join(map(re.escape, names))})$)": "none"}
        convert(folder, workdir / "kind", bits=BITS, quantizer="rtn", bits_for=others, progress=False)
        harms[kind] = judge.divergence(workdir / "kind") / errors[kind]
        shutil.rmtree(workdir / "kind")
    unit = harms.get(Kind.EXPERT, harms.get(Kind.MLP))
    assert unit is not None, "every model has one of them"
    layers = plan.config.text.num_hidden_layers
    ends = dict.fromkeys((Kind.EMBEDDING, Kind.HEAD), layers)
    return {kind: harm / unit / ends.get(kind, 1) for kind, harm in harms.items()}


def _squared_errors(plan: Plan) -> dict[Kind, float]:
    """The squared relative errors of the matrices of each kind, added up."""
    targets = [target for target in plan.targets if kind_of(target.spec) in _JUDGED]
    weights = harm_weights([target.spec for target in targets])
    sums: dict[Kind, float] = {}
    for each in measure(targets, (precision(BITS),), progress=False):
        spec = each.target.spec
        sums[kind_of(spec)] = sums.get(kind_of(spec), 0.0) + each.harm[precision(BITS)] / weights[spec.name]
    return sums


def use_weights(found: Mapping[Kind, float]) -> None:
    """Choose bits by these weights of kinds in this process."""
    KIND_WEIGHTS.update(found)
