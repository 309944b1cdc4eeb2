"""Runs a calibration text through the model while it is converted, one layer in memory at a time.

Each layer is run twice: as the source has it, to see what enters its matrices, and then as it was written, so that the
next layer sees what it will see in use, errors of the layers before it included.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_qwen.checkpoint.layout import Plan, plan_checkpoint
from mlx_qwen.checkpoint.names import Role
from mlx_qwen.checkpoint.shards import TensorInfo
from mlx_qwen.config import ModelConfig
from mlx_qwen.model.decoder import Residual

from ..arrays import FLOATS
from ..layerwise import LayerwiseModel, LinearInput, StreamedLayer
from ..layerwise.batching import window_batches
from ..quantize.correction import DAMPING
from ..quantize.inputs import Corrections, LayerInputs
from ..settings import DType
from .damage import check_sound

_TIED_DAMPING = 0.1


class Calibration:
    """The states of all calibration tokens between two layers.

    `windows` are token ids [n, T], `source` plans the model to convert, and `dtype` is that of its output. Both models
    compute in it on a GPU, and on a CPU, which is slow at half precision, in fp32.
    """

    def __init__(self, config: ModelConfig, source: Plan, windows: npt.NDArray[np.int64], dtype: DType) -> None:
        self._config = config
        self._dtype = FLOATS[dtype].mlx if mx.default_device() == mx.gpu else mx.float32
        self._source = LayerwiseModel(source, dtype=self._dtype)
        self._windows = windows
        self._hidden: list[Residual] = []
        self._passed = 0
        self._written: LayerwiseModel | None = None

    def follow(self, written: Mapping[str, TensorInfo]) -> None:
        """Say where the tensors of the output will be; see `observe` for when they have to be there."""
        infos: dict[str, TensorInfo] = {name: _Growing.of(info) for name, info in written.items()}
        self._written = LayerwiseModel(plan_checkpoint(self._config, infos), dtype=self._dtype)

    def observe(self, layer: int, wanted: Collection[str]) -> Corrections:
        """Run a layer as the source has it; returns the corrections of the tensors `wanted`.

        All layers before it are written by then, and embeddings that are not the head too; layers are observed in
        ascending order. Raises DamagedPieceError for weights that are not finite, before these enter anything.
        """
        self._advance(layer)
        check_sound(self._source.layer_targets(layer))
        inputs, streamed = LayerInputs(wanted), StreamedLayer(self._source, layer)
        for hidden in self._hidden:
            streamed(hidden, inputs)
        return inputs.corrections()

    def observe_head(self, name: str) -> Corrections:
        """The correction of the head `name`, from what the layers give it; all of them are written by then.

        Where it is the embeddings too, which must not suffer for the head's sake, with more damping.
        """
        self._advance(self._config.text.num_hidden_layers)
        inputs = LayerInputs({name}, _TIED_DAMPING if self._config.text.tie_word_embeddings else DAMPING)
        for hidden in self._hidden:
            normed = self._source.normed(hidden)
            inputs(LinearInput((name,), normed.reshape(-1, normed.shape[-1])))
        return inputs.corrections()

    def _advance(self, layer: int) -> None:
        """Go on until before `layer`, through the layers as they were written."""
        assert self._written is not None, "a calibration follows an output"
        if not self._hidden:
            check_sound(target for target in self._source.plan.targets if target.spec.role is Role.EMBEDDING)
            # Embeddings that serve as the head are written after all layers.
            embedding = self._source if self._config.text.tie_word_embeddings else self._written
            self._hidden = [embedding.embed(batch) for batch in window_batches(self._windows)]
        for index in range(self._passed, layer):
            streamed = StreamedLayer(self._written, index)
            self._hidden = [streamed(hidden) for hidden in self._hidden]
        self._passed = layer


@dataclass(frozen=True, slots=True)
class _Growing(TensorInfo):
    """A tensor of a file whose header is not complete yet, so that only reading its own bytes finds it."""

    @classmethod
    def of(cls, info: TensorInfo) -> "_Growing":
        return cls(info.name, info.file, info.dtype, info.shape, info.offset, info.nbytes)

    @property
    def is_computed(self) -> bool:
        """So that readers ask for the values instead of opening the file."""
        return True
