"""The first answers tell what the MTP layer reads, where the checkpoint does not."""

from pathlib import Path
from threading import Event

import pytest

import mlx_qwen
from mlx_qwen.engine import settling
from mlx_qwen.engine.thread import wake
from mlx_qwen.model import Model
from mlx_qwen.prompt import Processor
from tests.support.silent import silent_copy


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def ask(model: Model, processor: Processor, number: int, **options: object) -> str:
    question = [{"role": "user", "content": f"What is {number} + 67?"}]
    return mlx_qwen.generate(model, processor, question, enable_thinking=True, **options)  # type: ignore[arg-type]


class Once:
    """Work of one step."""

    def __init__(self) -> None:
        self.done = Event()

    def step(self) -> bool:
        self.done.set()
        return False


def wait_for_computing() -> None:
    """Until the computing thread has done what it was woken for."""
    for _ in range(2):
        once = Once()
        wake(once)
        assert once.done.wait(60)


def test_answers_settle_it_once_there_are_enough_and_are_the_same_after(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(settling, "ENOUGH_TOKENS", 90)
    folder = silent_copy(tmp_path / "silent", reads="residual")
    model, processor = mlx_qwen.load(folder)
    first = ask(model, processor, 58)
    wait_for_computing()
    assert model.mtp_unsettled is not None and model.mtp_reads == "normed"
    for number in (41, 29, 83):
        ask(model, processor, number)
    wait_for_computing()
    assert (model.mtp_reads, model.mtp_unsettled) == ("residual", None)
    assert ask(model, processor, 58) == first
    assert mlx_qwen.load(folder)[0].mtp_reads == "residual"


def test_answers_without_drafts_settle_nothing(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(settling, "ENOUGH_TOKENS", 1)
    model, processor = mlx_qwen.load(silent_copy(tmp_path / "silent", reads="residual"))
    ask(model, processor, 58, mtp=False)
    wait_for_computing()
    assert model.mtp_unsettled is not None
