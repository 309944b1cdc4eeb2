"""Ranks of unequal memory, and of unequally many layers, count what they may use alike."""

import json
import signal
import urllib.request
from itertools import product
from pathlib import Path

import pytest

from mlx_qwen.distributed.means import Means, agreed
from tests.distributed.processes import Ranks, ranks

MIB = 1 << 20
UNEQUAL = [
    [Means(800, 90, 400, 12, 36), Means(200, 40, 100, 4, 12)],
    [Means(300, 90, 700, 2, 7), Means(900, 80, 100, 9, 26), Means(500, 40, 300, 5, 15)],
    [Means(1000, 9, 50, 1, 1), Means(7, 8, 50, 3, 2)],
]


@pytest.mark.parametrize("uneven", UNEQUAL, ids=["two", "three", "tiny"])
def test_what_all_may_hold_each_has_room_for(uneven: list[Means]) -> None:
    means = agreed(uneven)
    for attention_bytes, linear_bytes in product(range(1, 40, 3), repeat=2):
        counted = means.attention * attention_bytes + means.linear * linear_bytes
        for one in uneven:
            held = one.attention * attention_bytes + one.linear * linear_bytes
            assert held * means.states <= counted * one.states, "states that all count as fitting do not fit"
            assert held * means.prefixes <= counted * one.prefixes, "prefixes that all count as fitting do not fit"
    assert means.piece == min(one.piece for one in uneven)


def test_ranks_that_hold_equal_shares_use_what_the_one_with_the_least_has() -> None:
    assert agreed([Means(500, 60, 70, 8, 24), Means(300, 90, 80, 8, 24)]) == Means(300, 60, 70, 8, 24)


def test_a_rank_without_layers_of_a_kind_leaves_all_what_they_have() -> None:
    assert agreed([Means(500, 60, 70, 1, 7), Means(500, 60, 70, 1, 0)]) == Means(500, 60, 70, 1, 7)


def machine(folder: Path, nbytes: int) -> dict[str, str]:
    """The environment of a rank on a machine with so much memory."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(f"import mlx_qwen.machine as m\nm.machine_bytes = lambda: {nbytes}\n")
    return {"PYTHONPATH": str(folder)}


def cached(started: Ranks, number: int) -> int:
    """How much of prompt `number` was read before."""
    prompt = [3 + (7 * place + 13 * number) % 190 for place in range(120)]
    body = json.dumps({"prompt": prompt, "max_tokens": 4}).encode()
    request = urllib.request.Request(f"{started.url()}/v1/completions", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as response:
        found: int = json.load(response)["usage"]["prompt_tokens_details"]["cached_tokens"]
        return found


@pytest.mark.parametrize("mebibytes", [(60, 40), (20, 60)], ids=["two layers", "no attention"])
def test_ranks_with_unequally_many_layers_drop_the_same_prefixes(tmp_path: Path, mebibytes: tuple[int, int]) -> None:
    # Most of eight layers, which hold five times the linear memory of two, fill this room with fewer prompts; a rank
    # that has the first layer alone has no attention.
    words = ("serve", "--port", 0, "--temp", 0, "--pipeline", "--prefix-cache-bytes", 1_500_000)
    machines = {0: machine(tmp_path / "zero", mebibytes[0] * MIB), 1: machine(tmp_path / "one", mebibytes[1] * MIB)}
    with ranks(2, *words, changes=machines) as started:
        assert [cached(started, number) for number in range(6)] == [0] * 6
        again = [cached(started, number) for number in reversed(range(6))]
        assert again[0] == 120
        assert again[-1] == 0
        started.processes[0].send_signal(signal.SIGINT)
        assert started.ended(60) == [0, 0]
