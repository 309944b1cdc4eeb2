"""What rank 0 makes of the steps that ranks report: who is late, differs or failed is named, and nobody else."""

import pytest

from mlx_qwen.distributed import pace
from mlx_qwen.distributed.pace import LAG, LONGEST, Pace, Step, Work


class Clock:
    """The time, as a test has it."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(pace, "monotonic", made)
    return made


def test_a_rank_that_is_late_is_named_within_ten_seconds_and_not_before_the_others_wait(clock: Clock) -> None:
    ranks = Pace(3)
    for number in range(4):
        ranks.began()
        clock.now += 60  # a step may take long, as long as it does so on all
        assert ranks.trouble() is None
        for rank in range(3):
            ranks.took(rank, Step(str(number)))
    ranks.began()
    ranks.took(0, Step("last"))
    ranks.took(1, Step("last"))
    clock.now += LAG - 0.1
    assert ranks.trouble() is None
    clock.now += 0.2
    assert LAG < 10
    assert ranks.trouble() == "rank 2 fell out of step: others went on 7 s ago"


def test_ranks_may_report_in_any_order_and_run_a_step_ahead(clock: Clock) -> None:
    ranks = Pace(2)
    for digest in ("a", "b"):
        ranks.took(1, Step(digest))
    for digest in ("a", "b"):
        ranks.took(0, Step(digest))
    clock.now += LAG + 1
    assert ranks.trouble() is None


def test_a_rank_that_wrote_something_else_is_named_at_once(clock: Clock) -> None:
    ranks = Pace(3)
    for rank, digest in enumerate(("a", "a", "b")):
        ranks.took(rank, Step(digest))
    assert str(ranks.trouble()).startswith("rank 2 wrote other tokens than rank 0")


def test_a_failure_explains_better_than_that_a_rank_is_late_or_differs(clock: Clock) -> None:
    ranks, others = Pace(2), Pace(2)
    ranks.took(0, Step("a"))
    ranks.took(1, Step("b", "RuntimeError: no memory"))
    assert ranks.trouble() == "rank 1 failed: RuntimeError: no memory"
    others.took(1, Step("b", "RuntimeError: no memory"))
    clock.now += LAG + 1
    assert others.trouble() == "rank 1 failed: RuntimeError: no memory"


def test_a_step_that_no_rank_finishes_ends(clock: Clock) -> None:
    ranks = Pace(2)
    ranks.began()
    clock.now += LONGEST - 1
    assert ranks.trouble() is None
    clock.now += 2
    assert "no rank has finished a step for 300 s" in str(ranks.trouble())


def computed(ranks: Pace, clock: Clock, work: Work, seconds: float) -> None:
    ranks.began(work)
    clock.now += seconds
    assert ranks.trouble() is None
    ranks.ended()


def test_a_step_that_takes_far_longer_than_others_did_ends_within_ten_seconds(clock: Clock) -> None:
    ranks, token = Pace(2), Work(is_prompt=False, tokens=1)
    for _ in range(6):
        computed(ranks, clock, token, 0.1)
    ranks.began(token)
    clock.now += LAG + 0.7
    assert ranks.trouble() is None
    clock.now += 0.2
    assert LAG + 0.9 < 10
    assert ranks.trouble() == "no rank has finished a step for 8 s: a connection between two of them may be dead"


def test_long_pieces_first_times_and_weights_that_were_put_aside_are_waited_for(clock: Clock) -> None:
    ranks = Pace(2)
    computed(ranks, clock, Work(is_prompt=False, tokens=1), LONGEST - 1)
    for _ in range(20):
        computed(ranks, clock, Work(is_prompt=False, tokens=1), 0.05)
        computed(ranks, clock, Work(is_prompt=True, tokens=16), 0.4)
    # 128 times as many tokens, each of which takes five times as long far behind the beginning.
    computed(ranks, clock, Work(is_prompt=True, tokens=2048), 5 * 128 * 0.4)
    computed(ranks, clock, Work(is_prompt=True, tokens=2048, foreseen=False), LONGEST - 1)
    computed(ranks, clock, Work(is_prompt=False, tokens=1), 0.05)
    clock.now += 3600
    computed(ranks, clock, Work(is_prompt=False, tokens=1), LONGEST - 1)
