"""An engine whose turns others take: it takes each that it tells them of, for they wait nowhere."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mlx_qwen.config import ModelConfig
from mlx_qwen.engine.engine import Engine
from mlx_qwen.engine.sequence import MOST_UNREAD, Sequence
from mlx_qwen.engine.turn import Turn
from mlx_qwen.loading import load_model
from tests.engine.sequences import prompt, sequence

Checkpoint = Callable[..., Path]


class Told:
    """Counts the turns that others are told of, and those that were taken here."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.sent = self.taken = 0
        self.computes = False

    def check(self, sequence: Sequence) -> None:
        """All can be told of."""

    def announce(self, sequence: Sequence) -> None:
        """All are ready at once."""
        self._engine.arrive(sequence)

    def send(self, turn: Turn) -> None:
        """A turn that the others take whatever happens."""
        self.sent += 1

    def computing(self, tokens: int, *, is_prompt: bool, foreseen: bool = True) -> None:
        """What is computed is told, and then that it is."""
        assert tokens > 0
        assert not self.computes
        self.computes = True

    def computed(self) -> None:
        """See `computing`."""
        assert self.computes
        self.computes = False

    def took(self, outgoing: object) -> None:
        """A turn that was taken here."""
        self.taken += 1

    def settled(self) -> int:
        """How many turns there were once nothing happens any more; fails where others took more than were taken."""
        end, before = time.monotonic() + 20, -1
        while before != self.sent and time.monotonic() < end:
            before = self.sent
            time.sleep(0.2)
        assert self.sent == before, "it goes on telling of turns in which nothing is to be done"
        assert self.sent == self.taken
        assert not self.computes
        return self.sent


@pytest.mark.parametrize("drafts", [0, 3])
def test_every_turn_that_others_were_told_of_is_taken_before_the_engine_sleeps(
    checkpoint: Checkpoint, drafts: int
) -> None:
    path = checkpoint("dense", with_mtp=True)
    engine = Engine(load_model(path, ModelConfig.from_directory(path)))
    told = Told(engine)
    engine.lead(told)
    assert len(list(engine.stream(_asked(engine, drafts, 12)))) == 12
    ended = told.settled()
    unread = _asked(engine, drafts, 400)
    behind = told.settled()
    assert behind > ended
    assert unread.unread.qsize() >= MOST_UNREAD
    engine.cancel(unread)
    assert unread.ended.wait(20)
    told.settled()


def _asked(engine: Engine, drafts: int, count: int) -> Sequence:
    one = sequence(engine.model, prompt(1), drafts, count=count)
    engine.submit(one)
    return one
