"""Goes on after a kernel failed on the device in the midst of answers."""

from collections.abc import Sequence as Listed

from mlx_qwen.engine.sequence import Sequence
from mlx_qwen.errors import MLXQwenError
from mlx_qwen.model import Model
from mlx_qwen.model.proving import leave_out_failing
from mlx_qwen.model.state import empty_state


def begin_again(model: Model, active: Listed[Sequence], error: BaseException) -> bool:
    """Let all `active` answers be read anew if `error` came from kernels of ours, which are then left out.

    What was being computed, and every buffer that it would have written, cannot be used any more. Returns whether it
    was so; it is not for an answer on a cache that held something before, which nobody can read again.
    """
    if not isinstance(error, RuntimeError | ValueError) or isinstance(error, MLXQwenError):
        return False
    if any(one.prompt_cache is not None and one.cached for one in active):
        return False
    models = [model, *(one.draft_model.model for one in active if one.draft_model is not None)]
    left_out = [leave_out_failing(each) for each in models]
    if not any(left_out):
        return False
    for sequence in active:
        sequence.begin_again()
        if sequence.prompt_cache is not None:
            packing = sequence.prompt_cache.state.chains[0].packing
            sequence.prompt_cache.state = empty_state(model.config.text, packing)
    return True
