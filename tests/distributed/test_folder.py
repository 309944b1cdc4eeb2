"""What several ranks have read outlives them: each keeps its share in a folder, and all go on from the same place."""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from threading import Barrier

import mlx.core as mx
import pytest

from mlx_qwen.engine.prefix_files import PrefixFiles
from mlx_qwen.engine.prefix_writer import length_of
from mlx_qwen.model.chain import Chain
from mlx_qwen.model.state import LinearState, State
from tests.distributed.processes import ranks

PROMPT = " ".join(f"The number {number} comes behind {number - 1}." for number in range(1, 30))
RANKS = 3
LENGTHS = (5, 9, 14, 20)
KEY = list(range(3, 23))


def state(length: int) -> State:
    chain = Chain.empty(1).grown(length)
    chain.write(0, mx.broadcast_to(mx.arange(length)[:, None], (2, 1, 1, length, 32)).astype(mx.bfloat16))
    made = State((chain,), (LinearState(mx.zeros((1, 3, 8)), mx.zeros((1, 2, 4, 4))),), None, None, mx.zeros((1, 1, 8)))
    mx.eval(made.arrays())
    return made


def gathering() -> list[Callable[[int], list[int]]]:
    """For each rank, what gives it every rank's number once all have given theirs."""
    barrier, table = Barrier(RANKS), [0] * RANKS

    def of_rank(rank: int) -> Callable[[int], list[int]]:
        def of_all(number: int) -> list[int]:
            table[rank] = number
            barrier.wait(20)
            found = list(table)
            barrier.wait(20)
            return found

        return of_all

    return [of_rank(rank) for rank in range(RANKS)]


@pytest.mark.filterwarnings("ignore:Damaged files in:RuntimeWarning")
@pytest.mark.parametrize("seed", range(6))
def test_ranks_go_on_from_the_longest_beginning_that_all_have_whole(tmp_path: Path, seed: int) -> None:
    random = Random(seed)
    folders = [PrefixFiles(tmp_path / str(rank), "a share", most_bytes=1 << 30) for rank in range(RANKS)]
    whole = [set(LENGTHS) for _ in folders]
    for folder, held in zip(folders, whole, strict=True):
        for length in LENGTHS:
            folder.put(KEY[:length], state(length))
        folder.flush()
        manifests = {length_of(file): file for file in folder.folder.iterdir() if length_of(file)}
        for length in random.sample(LENGTHS, random.randrange(3)):
            # A writer that was killed leaves pieces without a manifest; a disk may damage what is there.
            manifests[length].unlink() if random.random() < 0.5 else manifests[length].write_bytes(b"{}")
            held.discard(length)
    best = max(set.intersection(*whole), default=0)
    with ThreadPoolExecutor(RANKS) as pool:
        found = list(pool.map(lambda pair: pair[0].take(KEY, of_all=pair[1]), zip(folders, gathering(), strict=True)))
    assert [0 if one is None else one.length for one in found] == [best] * RANKS
    for folder in folders:
        folder.close()


def test_a_later_command_on_two_ranks_reads_nothing_of_what_both_kept(tmp_path: Path, folder: Path) -> None:
    # Each rank finds a folder of its own under the same name.
    changes = {rank: {"HOME": str(tmp_path / name)} for rank, name in enumerate(("zero", "one"))}
    words = [PROMPT, "--ignore-chat-template", "--temp", 0, "--mtp", 0, "--max-tokens", 8, "--json"]
    words += ["--model", folder, "--prefix-cache-dir", "~/kept"]

    def answered() -> tuple[str, int, int]:
        with ranks(2, "generate", *words, changes=changes) as started:
            assert started.ended(60) == [0, 0], started.err(0)
            said = json.loads(started.out(0))
            return said["text"], said["usage"]["cached_tokens"], said["usage"]["prompt_tokens"]

    text, cached, length = answered()
    assert cached == 0
    assert length > 200
    kept = [{length_of(file) for file in (tmp_path / name / "kept").glob("*.json")} for name in ("zero", "one")]
    assert kept[0] == kept[1]
    assert {length - 64, length} <= kept[0]
    for file in (tmp_path / "one" / "kept").glob("*.json"):
        if (length_of(file) or 0) >= length:
            file.unlink()
    assert answered() == (text, length - 64, length)
