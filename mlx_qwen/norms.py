"""Plausibility of the norms: the commonest silent damage to a checkpoint is 1 added to them twice, or never."""

import mlx.core as mx
import numpy as np

from mlx_qwen.errors import CheckpointError
from mlx_qwen.model import Model

_MOST_NEGATIVE = 0.1
_LEAST_FACTOR, _LEAST_MEAN = 1.0, 1.5
_OUTLIERS = 0.001


def check_norms(model: Model) -> None:
    """Raise CheckpointError when the zero-centred norms look shifted twice or not at all.

    A trained factor 1 + w is positive nearly everywhere, and below 1 somewhere. Without the shift, many factors are
    negative or all are near 0; with two, hardly any is below 1 and their mean is above 1.5.
    """
    norms = [norm.weight for layer in model.layers for norm in (layer.input_layernorm, layer.post_attention_layernorm)]
    factors = np.array(mx.concatenate([*norms, model.norm.weight]))
    if not np.isfinite(factors).all():
        raise CheckpointError("Some RMSNorm weights are NaN or infinite. The checkpoint is damaged: download it again.")
    negative = float((factors < 0).mean())
    if negative > _MOST_NEGATIVE or np.abs(factors).mean() < _MOST_NEGATIVE:
        raise CheckpointError(
            f"{negative:.0%} of the RMSNorm factors are negative and their mean is {factors.mean():.2f}, expected "
            "positive ones around 1. The 1 of the factors 1 + w was never added: convert the model again."
        )
    least = float(np.quantile(factors, _OUTLIERS))
    if least >= _LEAST_FACTOR and factors.mean() >= _LEAST_MEAN:
        raise CheckpointError(
            f"Nearly all RMSNorm factors are at least {least:.2f} and their mean is {factors.mean():.2f}, expected "
            "around 1. The 1 of the factors 1 + w was added twice: convert the model again."
        )
