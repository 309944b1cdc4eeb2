"""A model of which one decoder layer at a time is in memory, with the rows of embeddings and head that are needed.

    with open_layerwise(folder, dtype=mx.float32) as model:
        hidden = model.embed(input_ids)
        for layer in model.layers():
            hidden = layer(hidden)
        logits = model.logits(hidden)

Batches that together are too large go through each layer one after the other: `hidden = [layer(h) for h in hidden]`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map

from mlx_qwen.checkpoint.hub import resolve
from mlx_qwen.checkpoint.layout import Plan, Target
from mlx_qwen.checkpoint.matrices import Matrix, read_matrices, read_rows
from mlx_qwen.checkpoint.names import text_prefix
from mlx_qwen.config import ModelConfig
from mlx_qwen.loading import plan_model
from mlx_qwen.model.decoder import DecoderLayer, Residual
from mlx_qwen.model.layers import AnyLinear, RMSNorm
from mlx_qwen.model.rope import Positions
from mlx_qwen.model.weights import fill_layer, linear

from .observing import Observer, observed

HEAD_ROWS = 8192
_CACHE_BYTES = 32 << 20


@contextmanager
def open_layerwise(
    path_or_repo: str | Path, *, revision: str | None = None, dtype: mx.Dtype | None = None
) -> Iterator["LayerwiseModel"]:
    """The text model of a folder or repository that `load` takes, one layer at a time; arguments as in `load`.

    Within, MLX keeps few freed buffers, so that the memory of one layer serves the next.

    Raises:
        ConfigError: config.json is missing or describes no model of this family.
        CheckpointError: files are missing or damaged, or tensors do not match the config.
    """
    folder = resolve(path_or_repo, revision=revision)
    config = ModelConfig.from_directory(folder)
    with little_cache():
        yield LayerwiseModel(plan_model(folder, config), dtype=dtype)


@contextmanager
def little_cache() -> Iterator[None]:
    """Within, MLX keeps few freed buffers."""
    before = mx.set_cache_limit(_CACHE_BYTES)
    try:
        yield
    finally:
        mx.set_cache_limit(before)
        mx.clear_cache()


class LayerwiseModel:
    """The text model that `plan` reads; vision tower and MTP layer are left on disk.

    `dtype` is what unpacked weights and activations become, the checkpoint's own by default.
    """

    def __init__(self, plan: Plan, *, dtype: mx.Dtype | None = None) -> None:
        config = plan.config
        self.config = config
        self.plan = plan
        self.dtype = dtype
        self._prefix = text_prefix(config)
        self._targets = {target.spec.name: target for target in plan.targets}
        self._embeddings = self._targets[f"{self._prefix}model.embed_tokens.weight"]
        self._head = self._targets.get(f"{self._prefix}lm_head.weight", self._embeddings)

    def embed(self, input_ids: mx.array) -> Residual:
        """What enters the first layer, for int [B, T]: embeddings [B, T, hidden_size], of which only these are read."""
        rows, places = np.unique(np.array(input_ids), return_inverse=True)
        read = [read_rows(self._embeddings, int(row), int(row) + 1, self.dtype) for row in rows]
        joined = {name: mx.concatenate([x.arrays()[name] for x in read]) for name in read[0].arrays()}
        vectors = self._vectors(read[0].with_arrays(joined))[mx.array(places.reshape(input_ids.shape))]
        mx.eval(vectors)
        return Residual(vectors)

    def layers(self) -> Iterator["StreamedLayer"]:
        """The decoder layers in order; each is read when its turn comes, and let go when the next one's comes."""
        for i in range(self.config.text.num_hidden_layers):
            layer = StreamedLayer(self, i)
            try:
                yield layer
            finally:
                layer.release()

    def normed(self, hidden: Residual) -> mx.array:
        """The head's input [B, T, hidden_size], in the model's dtype."""
        text = self.config.text
        norm = RMSNorm(text.hidden_size, text.rms_norm_eps)
        norm.weight = self._matrices([self._targets[f"{self._prefix}model.norm.weight"]])["model.norm"].weight
        return norm(hidden.sum(), self._activation_dtype)

    def head(self, rows: int = HEAD_ROWS) -> Iterator[AnyLinear]:
        """The head in blocks of `rows` tokens of the vocabulary, in order; each maps `normed` to its logits."""
        vocab = self.config.text.vocab_size
        for first in range(0, vocab, rows):
            yield linear(read_rows(self._head, first, min(first + rows, vocab), self.dtype))

    def logits(self, hidden: Residual) -> mx.array:
        """Logits [B, T, vocab_size] after the last layer; take `head` where they would be too large."""
        normed = self.normed(hidden)
        blocks = []
        for block in self.head():
            blocks.append(block(normed))
            mx.eval(blocks[-1])
        return mx.concatenate(blocks, axis=-1)

    def layer_targets(self, index: int) -> list[Target]:
        """How each tensor of decoder layer `index` is stored."""
        prefix = self.layer_prefix(index)
        return [target for name, target in self._targets.items() if name.startswith(prefix)]

    def layer_prefix(self, index: int) -> str:
        """How the names of the tensors of decoder layer `index` begin."""
        return f"{self._prefix}model.layers.{index}."

    def read_layer(self, index: int) -> DecoderLayer:
        """Decoder layer `index`, in memory."""
        text = self.config.text
        linear_attention = text.layer_types[index] == "linear_attention"
        layer = DecoderLayer(text, linear=linear_attention, sparse=text.sparse_layers[index])
        prefix = self.layer_prefix(index).removeprefix(self._prefix)
        tensors = {
            name.removeprefix(prefix): matrix for name, matrix in self._matrices(self.layer_targets(index)).items()
        }
        fill_layer(layer, tensors, text, self.config.is_next)
        del tensors
        # One by one, so that what a matrix is joined from is gone before the next is read.
        tree_map(mx.eval, layer.parameters())
        return layer

    def _matrices(self, targets: list[Target]) -> dict[str, Matrix]:
        return read_matrices(targets, self.config, self.dtype)

    @property
    def _activation_dtype(self) -> mx.Dtype:
        return self._vectors(read_rows(self._embeddings, 0, 1, self.dtype)).dtype

    def _vectors(self, embeddings: Matrix) -> mx.array:
        """Rows of the embedding, unpacked; those of microscaling formats would come in bf16."""
        vectors = embeddings.dense()
        return vectors if self.dtype is None else vectors.astype(self.dtype)


class StreamedLayer:
    """Decoder layer `index` of a LayerwiseModel, in memory until `release`."""

    def __init__(self, model: LayerwiseModel, index: int) -> None:
        self.index = index
        self.targets = model.layer_targets(index)
        self._prefix = model.layer_prefix(index)
        self._module: DecoderLayer | None = model.read_layer(index)

    def __call__(self, hidden: Residual, observer: Observer | None = None) -> Residual:
        """One layer on, for whole sequences without padding; evaluated when it returns.

        `observer` is called with a `LinearInput` for each group of matrices that read the same rows, in the order in
        which they run. Rows are those of all B · T tokens; the experts' are sorted by expert.
        """
        module = self._module
        if module is None:
            raise ValueError(f"layer {self.index} was let go; use a layer before the next one is taken")
        if observer is None:
            left = module(hidden, Positions(mx.array(0)), None, None)
        else:
            names = {target.spec.name for target in self.targets}
            with observed(module, self._prefix, names, observer):
                left = module(hidden, Positions(mx.array(0)), None, None)
        mx.eval(left)
        return left

    def release(self) -> None:
        """Let the layer's memory go."""
        self._module = None
