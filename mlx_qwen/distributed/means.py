"""What ranks may use for answers: each has its own memory, and all have to decide alike."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from mlx_qwen.config import LayerType, TextConfig
from mlx_qwen.engine.engine import Engine
from mlx_qwen.engine.prefix import Counted


class Means(NamedTuple):
    """What one rank has, in bytes, and of how many layers of each kind it holds states.

    Attributes:
        states: for the states of all answers.
        piece: for what is alive while a piece of a prompt is read.
        prefixes: for what was read before.
        attention, linear: layers.
    """

    states: int
    piece: int
    prefixes: int
    attention: int
    linear: int

    @property
    def layers(self) -> tuple[int, int]:
        """Both numbers of layers."""
        return self.attention, self.linear


def means_of(engine: Engine) -> Means:
    """Those of this rank."""
    kept = engine.prefixes.budget_bytes if engine.prefixes is not None else 0
    return Means(engine.memory.state_bytes, engine.memory.piece_bytes, kept, *_layers(engine.model.share.text))


def agreed(ranks: Sequence[Means]) -> Means:
    """What all of them count with, so that they decide alike and none uses more than it has.

    Bytes are those of the rank with the least; layers of one with more count for as much less, and of each kind there
    are as many as where these count most.
    """
    states = min(one.states for one in ranks)
    attention, linear = (
        max(-(-layers * states // one.states) for layers, one in zip(kind, ranks, strict=True))
        for kind in zip(*(one.layers for one in ranks), strict=True)
    )
    prefixes = min(
        one.prefixes * min(counted, own) // own
        for one in ranks
        for counted, own in zip((attention, linear), one.layers, strict=True)
        if own
    )
    return Means(states, min(one.piece for one in ranks), prefixes, attention, linear)


def agree(engine: Engine, means: Means) -> None:
    """Let an engine count as all ranks do."""
    share = engine.model.share
    text = share.text if share.layers is None else _with_layers(share.whole, means)
    engine.memory.agree(text, means.states, means.piece)
    engine.store.limit(means.prefixes)
    if share.layers is not None:
        engine.store.count(Counted(text, engine.model.dtype.size))


def _with_layers(whole: TextConfig, means: Means) -> TextConfig:
    """A model of so many layers of each kind, with experts in some where `whole` has them in some."""
    linear: tuple[LayerType, ...] = ("linear_attention",)
    attention: tuple[LayerType, ...] = ("full_attention",)
    kinds = linear * means.linear + attention * means.attention
    sparse = (tuple(sorted(set(whole.sparse_layers))) * len(kinds))[: len(kinds)]
    return replace(whole, num_hidden_layers=len(kinds), layer_types=kinds, sparse_layers=sparse)


def _layers(text: TextConfig) -> tuple[int, int]:
    attention = text.layer_types.count("full_attention")
    return attention, text.num_hidden_layers - attention
