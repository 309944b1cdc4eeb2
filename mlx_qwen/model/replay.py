"""Steps of a few tokens as replayed graphs.

Building a step's graph in Python costs more than many of its kernels. Between two attention layers every shape of a
step of T tokens in B sequences is fixed, so these stretches are traced once for each T and B by `mx.compile` and
replayed; only the attention cores, whose keys and values grow, are built anew for each step.
"""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import mlx.core as mx

from metal_kernels import Backend, backend
from metal_kernels._choices import Choices, choices
from metal_kernels.gated_delta import Tape as LayerTape
from metal_kernels.gated_delta import roll_back
from mlx_qwen.checkpoint.mtp_reads import MTPReads
from mlx_qwen.model.attention import Heads, KeyValues
from mlx_qwen.model.chain import Chain
from mlx_qwen.model.decoder import DecoderLayer, Residual
from mlx_qwen.model.layers import RMSNorm as Norm
from mlx_qwen.model.mtp import MTP
from mlx_qwen.model.rope import Positions
from mlx_qwen.model.state import LinearState, State

Arrays = Sequence[mx.array]
Embed = Callable[[mx.array], mx.array]
MOST_REPLAYED_TOKENS = 8


def can_compile() -> bool:
    """Whether `mx.compile` works here and pays: on a GPU unless measured otherwise, on a CPU where there is g++."""
    return choices().replay and (mx.default_device().type == mx.DeviceType.gpu or _has_host_compiler())


def made_with() -> tuple[Backend, Choices]:
    """What decides how operations run that are traced now."""
    return backend(), choices()


@cache
def _has_host_compiler() -> bool:
    return shutil.which("g++") is not None


class ReplayedStep:
    """A model's decoder for 1 to 8 new tokens a sequence: the same values as its layers one after the other."""

    def __init__(self, embed: Embed, layers: Sequence[DecoderLayer]) -> None:
        attention = [i for i, layer in enumerate(layers) if not layer.is_linear]
        starts, ends = [None, *attention], [*attention, len(layers)]
        self._stretches = [_Stretch(embed, layers, start, end) for start, end in zip(starts, ends, strict=True)]

    def __call__(
        self, input_ids: mx.array, state: State, chains: Sequence[Chain], mask: mx.array | None, *, tape: bool
    ) -> tuple[mx.array, tuple[LinearState, ...], tuple[LayerTape, ...]]:
        """Hidden states fp32 [B, T, hidden] of `input_ids` [B, T], the linear layers' next states, and their tapes.

        `state` has been through at least one token; `chains` are its own, grown by T, and are written. `mask` is bool
        [B, 1, T, S], for padded batches.
        """
        position = state.positions()
        entering: Arrays = (input_ids,)
        held, linear, tapes = iter(state.linear), [], []
        for number, stretch in enumerate(self._stretches):
            leaving, states, taped = stretch(entering, position, [next(held) for _ in stretch.linear], tape=tape)
            linear += states
            tapes += taped
            if stretch.closing is None:
                break
            x, heads = leaving[0], Heads(*leaving[1:])
            attended = stretch.closing.self_attn.attend(heads, KeyValues(chains, number), mask)
            entering = (x, attended, heads.gate)
        return leaving[0], tuple(linear), tuple(tapes)


class ReplayedFill:
    """The MTP layer's keys and values of 1 to 8 new tokens of text; it `reads` what the final `norm` gives, or not."""

    def __init__(self, embed: Embed, norm: Norm, mtp: MTP, reads: MTPReads) -> None:
        def run(last: mx.array, hidden: mx.array, input_ids: mx.array, position: mx.array) -> mx.array:
            states, embeddings = mx.concatenate([last, hidden[:, :-1]], axis=1), embed(input_ids)
            read = norm(states, embeddings.dtype) if reads == "normed" else states
            return mtp.keys_and_values(read, embeddings, Positions(position - 1))

        self._run = mx.compile(run)

    def __call__(self, last: mx.array, hidden: mx.array, input_ids: mx.array, position: mx.array) -> mx.array:
        """Keys and values [2, B, Hkv, T, D] of `last` [B, 1, hidden] and all of `hidden` [B, T, hidden] but its end.

        `input_ids` [B, T] are the tokens of `hidden`, `position` [] or [B] that of the first of them.
        """
        filled: mx.array = self._run(last, hidden, input_ids, position)
        return filled


class ReplayedDraft:
    """The MTP layer's step of 1 to 8 tokens of text; it `reads` what the final `norm` gives, or not."""

    def __init__(self, embed: Embed, norm: Norm, mtp: MTP, reads: MTPReads) -> None:
        layer = mtp.layers[0]
        self._attention = layer.self_attn

        def enter(states: mx.array, input_ids: mx.array, position: mx.array, first: bool) -> Arrays:
            embeddings = embed(input_ids)
            read = norm(states, embeddings.dtype) if first and reads == "normed" else states
            x, normed = mtp.entering(read, embeddings).normed(layer.input_layernorm)
            return [x, *layer.self_attn.heads(normed, Positions(position))]

        def leave(x: mx.array, attended: mx.array, gate: mx.array) -> mx.array:
            return layer.feed_forward(Residual(x, layer.self_attn.output(attended, gate))).normed(mtp.norm)[1]

        self._enter, self._leave = mx.compile(enter), mx.compile(leave)

    def __call__(
        self, states: mx.array, input_ids: mx.array, position: mx.array, chains: Sequence[Chain], *, chained: bool
    ) -> mx.array:
        """What the head and the next step of the chain read, as of an `MTP`; `chains`, grown by T, are written."""
        x, q, kv, gate = self._enter(states, input_ids, position, not chained)
        attended = self._attention.attend(Heads(q, kv, gate), KeyValues(chains, 0), None)
        normed: mx.array = self._leave(x, attended, gate)
        return normed


class ReplayedRollBack:
    """What `rolled_back` gives, of all layers in one graph."""

    def __init__(self) -> None:
        def run(kept: mx.array, tapes: Sequence[Arrays], before: Sequence[Arrays]) -> list[mx.array]:
            layers = zip(tapes, before, strict=True)
            return [part for tape, held in layers for part in roll_back(LayerTape(*tape), kept, *held)]

        self._run = mx.compile(run)

    def __call__(
        self, tapes: Sequence[LayerTape], kept: Sequence[int], before: Sequence[LinearState]
    ) -> tuple[LinearState, ...]:
        """Arguments and result as of `rolled_back`."""
        parts = self._run(mx.array(list(kept)), list(tapes), list(before))
        return tuple(map(LinearState, parts[::2], parts[1::2]))


class ReplayedHead:
    """The final norm and the head behind it, of 1 to 8 tokens."""

    def __init__(self, norm: Norm, head: Embed, dtype: mx.Dtype) -> None:
        self._run = mx.compile(lambda hidden: head(norm(hidden, dtype)))

    def __call__(self, hidden: mx.array) -> mx.array:
        """Logits [B, T, vocab_size] in `dtype` of hidden fp32 [B, T, hidden]."""
        logits: mx.array = self._run(hidden)
        return logits


@dataclass(eq=False, slots=True)
class Replays:
    """A model's replayed graphs, each made when it is first used.

    The weights and what they are `made_with` are constants of the traced graphs: others replace them after a change.
    """

    made_with: tuple[object, ...]
    step: ReplayedStep | None = None
    fill: ReplayedFill | None = None
    head: ReplayedHead | None = None
    draft: ReplayedDraft | None = None
    roll_back: ReplayedRollBack | None = None


class _Stretch:
    """What follows one attention core (or the embedding), the linear layers after it, and the next projections."""

    def __init__(self, embed: Embed, layers: Sequence[DecoderLayer], start: int | None, end: int) -> None:
        self._embed = embed
        self._opening = None if start is None else layers[start]
        self.linear = layers[0 if start is None else start + 1 : end]
        self.closing = layers[end] if end < len(layers) else None
        self._plain = mx.compile(lambda *given: self._run(*given, tape=False))
        self._taped = mx.compile(lambda *given: self._run(*given, tape=True))

    def __call__(
        self, entering: Arrays, position: mx.array, states: Sequence[LinearState], *, tape: bool
    ) -> tuple[Arrays, list[LinearState], list[LayerTape]]:
        """Run on what the last core left: x and the next core's heads, the linear layers' states, and their tapes."""
        run = self._taped if tape else self._plain
        outputs: list[mx.array] = run(list(entering), position, [part for entry in states for part in entry])
        layers, each = len(self.linear), 2 + (len(LayerTape._fields) if tape else 0)
        own = outputs[len(outputs) - layers * each :]
        parts = [own[i * each : (i + 1) * each] for i in range(layers)]
        tapes = [LayerTape(*part[2:]) for part in parts] if tape else []
        return outputs[: len(outputs) - len(own)], [LinearState(*part[:2]) for part in parts], tapes

    def _run(self, entering: Arrays, position: mx.array, states: Arrays, *, tape: bool) -> list[mx.array]:
        positions = Positions(position)
        if self._opening is None:
            residual = Residual(self._embed(entering[0]))
        else:
            x, attended, gate = entering
            residual = self._opening.feed_forward(Residual(x, self._opening.self_attn.output(attended, gate)))
        left: list[mx.array] = []
        for i, layer in enumerate(self.linear):
            residual, mixed = layer.mix(residual, LinearState(*states[2 * i : 2 * i + 2]), tape=tape)
            left += [*mixed.memory, *(mixed.tape or ())]
        if self.closing is None:
            return [residual.sum(), *left]
        x, normed = residual.normed(self.closing.input_layernorm)
        return [x, *self.closing.self_attn.heads(normed, positions), *left]
