"""Which inputs of a matrix are strong on a calibration text, and make errors of its columns count more."""

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_qwen.checkpoint.layout import Plan
from mlx_qwen.checkpoint.names import decoder_layer, text_prefix
from mlx_qwen.config import ModelConfig

from ..layerwise import LayerwiseModel, LinearInput
from ..layerwise.batching import window_batches
from ..work.damage import check_sound


def input_squares(config: ModelConfig, plan: Plan, windows: npt.NDArray[np.int64]) -> dict[str, mx.array]:
    """The sum of squares of each input, fp32 [K], of the decoder layers' matrices and of a head of its own.

    `windows` are token ids [n, T]. The model that `plan` reads runs over them, one layer in memory at a time, in its
    own dtype on a GPU and in fp32 on a CPU. Those of all experts of a layer are added up. Raises DamagedPieceError for
    weights that are NaN or infinite, before these enter anything.
    """
    sums: dict[str, mx.array] = {}

    def observe(seen: LinearInput) -> None:
        squares = mx.square(seen.x.astype(mx.float32)).sum(axis=0)
        for name in seen.names:
            sums[name] = sums[name] + squares if name in sums else squares

    model = LayerwiseModel(plan, dtype=None if mx.default_device() == mx.gpu else mx.float32)
    check_sound(target for target in plan.targets if decoder_layer(target.spec.name) is None)
    batches = [model.embed(batch) for batch in window_batches(windows)]
    for layer in model.layers():
        check_sound(layer.targets)
        batches = [layer(batch, observe) for batch in batches]
        mx.eval(sums)
    if not config.text.tie_word_embeddings:
        for batch in batches:
            normed = model.normed(batch)
            observe(LinearInput((f"{text_prefix(config)}lm_head.weight",), normed.reshape(-1, normed.shape[-1])))
    return sums
