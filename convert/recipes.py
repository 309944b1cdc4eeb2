"""Which tensor gets how many bits."""

from mlx_qwen.checkpoint import Quantization
from mlx_qwen.tensors import MTP_PREFIX, Role, TensorSpec

CAREFUL = Quantization(bits=8, group_size=64)

_MATRICES = (Role.EMBEDDING, Role.HEAD, Role.LINEAR, Role.EXPERT, Role.ROUTER)


def uniform(spec: TensorSpec, asked: Quantization | None) -> Quantization | None:
    """The precision of one tensor when most matrices get `asked`; None leaves it unpacked.

    The router and the gate of the shared expert choose paths, and the MTP layer is useless once its guesses are
    rejected: both are small and get 8 bits. Decay inputs, convolutions, norms, biases and vision stay as they are, and
    so does a matrix whose columns do not divide into groups.
    """
    wanted = requested(spec, asked)
    return wanted if wanted is not None and spec.shape[-1] % wanted.group_size == 0 else None


def requested(spec: TensorSpec, asked: Quantization | None) -> Quantization | None:
    """What `uniform` would choose if the columns of every matrix divided into groups."""
    if asked is None or spec.role not in _MATRICES:
        return None
    careful = spec.role is Role.ROUTER or spec.name.startswith(MTP_PREFIX)
    return CAREFUL if careful else asked
