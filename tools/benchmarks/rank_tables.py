"""The tables of `ranks`: what ranks compute beside one rank, and what they take."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mlx_qwen.bench.table import Table
from mlx_qwen.bench.timing import OURS, PEER

Logits = npt.NDArray[np.float32]
Name = tuple[str, str]
_RUNTIMES = ("ours", "theirs")


@dataclass(frozen=True, slots=True)
class Found:
    """What rank 0 of `count` saw of a model, and by runtime its logits [B, T, vocabulary]."""

    count: int
    seen: dict[str, Any]
    logits: dict[str, Logits]


def computed(found: Sequence[Mapping[Name, Found]], tokens: int) -> Table:
    """Logits and tokens of each number of ranks beside those of one rank, which come first in `found`."""
    rows = []
    for name, alone, others in _by_model(found):
        exact = found[0].get((name[0], "fp32")) if name[1] == "bf16" else None
        compared = [("1, again", alone, alone, " again")]
        compared += [("1, from fp32", alone, exact, "")] if exact is not None else []
        compared += [(str(one.count), one, alone, "") for one in others]
        for ranks, one, other, again in compared:
            cells = [cell for runtime in _RUNTIMES for cell in _beside(one, other, runtime, again)]
            rows.append([" ".join(name), ranks, *cells, _between(one), _from_exact(one, exact)])
    note = (
        "Differences are the largest of all logits of a few prompts and their answers, in parts of the largest logit, "
        "from those of one rank. “Again” is one rank itself, which reads them token by token, “from fp32” one rank in "
        "bf16 beside one in fp32: what rounding does. “Other” counts the places where another token is the likeliest, "
        "and says how far ahead the likeliest was there at most, in the same parts. “Equal” counts greedy answers of "
        f"{tokens} tokens that are the same. Distances from fp32 in the last column are root mean squares, in parts of "
        f"the largest logit. Empty cells of {PEER} are what it does not divide, or not compute on a CPU; it sees no "
        "picture."
    )
    columns = [f"{runtime} {what}" for runtime in (OURS, PEER) for what in ("differs", "other", "equal")]
    return Table("What ranks compute", note, ("", "ranks", *columns, "between them", "both from fp32"), rows)


def taken(found: Sequence[Mapping[Name, Found]], turns: int) -> Table:
    """Time a token, bytes of a rank and what it sends for a token."""
    rows = []
    for name, alone, others in _by_model(found):
        for one in (alone, *others):
            sent = [cell for runtime in _RUNTIMES for cell in _sent(one, runtime)]
            rows.append([" ".join(name), str(one.count), *_times(one), *_bytes(one), *sent])
    note = (
        f"Times are medians of {turns} turns in alternation, each token awaited. All ranks share this machine's cores "
        "and sleep while they wait: times tell what exchanges cost here, and nothing about several machines. Bytes are "
        "those of rank 0 without the vision tower, which waits on the disk for a picture: its parameters, what it "
        "reads to load them, and its peak meanwhile above what it holds, beside the largest stored tensor. "
        "Exchanges are those of a token: two a layer, that of the embedding and that of the logits."
    )
    sizes = ("holds", "reads", "peak above", "largest tensor")
    sends = [f"{runtime} {what}" for runtime in (OURS, PEER) for what in ("exchanges", "sends")]
    return Table("What ranks take", note, ("", "ranks", OURS, PEER, "ratio", *sizes, *sends), rows)


def _by_model(found: Sequence[Mapping[Name, Found]]) -> Iterator[tuple[Name, Found, list[Found]]]:
    for name, alone in found[0].items():
        yield name, alone, [each[name] for each in found[1:] if name in each]


def _beside(found: Found, alone: Found, runtime: str, again: str = "") -> list[str]:
    """How far logits are from those of one rank, places of another likeliest token, and equal answers."""
    if runtime not in found.logits or runtime not in alone.logits:
        return ["", "", ""]
    logits, expected = found.logits[runtime + again], alone.logits[runtime]
    answers = found.seen["again" if again else "answers"][runtime]
    pairs = list(zip(answers, alone.seen["answers"][runtime], strict=True))
    equal = sum(one == other for one, other in pairs)
    return [f"{_difference(logits, expected):.1e}", _others(logits, expected), f"{equal} of {len(pairs)}"]


def _others(logits: Logits, expected: Logits) -> str:
    other = logits.argmax(axis=-1) != expected.argmax(axis=-1)
    if not other.any():
        return f"0 of {other.size}"
    two = np.sort(expected[other], axis=-1)[:, -2:]
    ahead = (two[:, 1] - two[:, 0]).max() / np.abs(expected).max()
    return f"{other.sum()} of {other.size}, ahead by {ahead:.0e}"


def _difference(logits: Logits, expected: Logits) -> float:
    return float(np.abs(logits - expected).max() / np.abs(expected).max())


def _between(found: Found) -> str:
    if "theirs" not in found.logits:
        return ""
    return f"{_difference(found.logits['ours'], found.logits['theirs']):.1e}"


def _from_exact(found: Found, exact: Found | None) -> str:
    if exact is None:
        return ""
    both = [runtime for runtime in _RUNTIMES if runtime in found.logits]
    distances = (np.sqrt(np.square(found.logits[one] - exact.logits[one]).mean()) for one in both)
    return " / ".join(f"{distance / np.abs(exact.logits['ours']).max():.1e}" for distance in distances)


def _times(found: Found) -> list[str]:
    seconds = found.seen["seconds"]
    cells = [f"{1e3 * seconds[runtime]:.1f} ms" if runtime in seconds else "" for runtime in _RUNTIMES]
    return [*cells, f"{seconds['theirs'] / seconds['ours']:.2f}" if all(cells) else ""]


def _bytes(found: Found) -> list[str]:
    seen = found.seen
    sizes = (seen["held"], seen["read"], seen["peak"] - seen["held"], seen["largest"])
    shown = (True, found.count > 1, found.count > 1, True)
    return [f"{size / 1e6:.2f} MB" if show else "" for size, show in zip(sizes, shown, strict=True)]


def _sent(found: Found, runtime: str) -> list[str]:
    """How many exchanges a token takes, and what the rank sends to its neighbour in all of them."""
    given = found.seen["sent"].get(runtime)
    if not given:
        return ["", ""]
    count = found.count
    sent = sum((count - 1) * nbytes * (1 if kind == "gather" else 2 / count) for kind, nbytes in given)
    return [str(len(given)), f"{sent / 1e3:.1f} kB"]
