"""A folder of checkpoints: read back bit for bit, never wrong, whatever happened to it or to those who wrote it."""

import gc
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from random import Random

import mlx.core as mx
import numpy as np
import pytest

from mlx_qwen.engine import prefix_files, prefix_writer, sealed
from mlx_qwen.engine.prefix import Found
from mlx_qwen.engine.prefix_files import PrefixFiles
from mlx_qwen.model.chain import Chain, Packing
from mlx_qwen.model.state import LinearState, State

ROOT = Path(__file__).resolve().parents[2]
PLENTY = 1 << 40
PACKING = Packing(8, 32)
DAMAGED = pytest.mark.filterwarnings("ignore:Damaged files in:RuntimeWarning")


def read(ids: list[int], *, packing: Packing | None = None, mtp: bool = True, before: State | None = None) -> State:
    """A state that tells its tokens: every row holds its token, the rest the sum."""
    state = before or State((Chain.empty(2, packing),), mtp=(Chain.empty(1, packing),) if mtp else ())
    new = ids[state.offset :]
    rows = mx.broadcast_to(mx.array(new, mx.bfloat16)[:, None], (2, 1, 1, len(new), 32))
    chain = state.chains[0].grown(len(new))
    for layer in range(2):
        chain.write(layer, rows + layer)
    grown_mtp = ()
    if mtp:
        missing = 0 if state.offset else 1
        longer = state.mtp[0].grown(len(new) - missing)
        if longer.length > state.mtp[0].length:
            longer.write(0, rows[..., missing:, :])
        grown_mtp = (longer,)
    total = float(sum(ids))
    linear = LinearState(mx.full((1, 3, 8), total, mx.bfloat16), mx.full((1, 2, 4, 4), total))
    state = State((chain,), (linear,), (len(ids),), None, mx.full((1, 1, 8), total), grown_mtp)
    mx.eval(state.arrays())
    return state


def bytes_of(state: State) -> list[tuple[object, ...]]:
    rows = [(chain, layer) for chain, layer in ((state.chains[0], 0), (state.chains[0], 1))]
    rows += [(chain, 0) for chain in state.mtp if chain.length]
    parts = [part for chain, layer in rows for part in _parts(chain.read(layer))]
    arrays = [*parts, *state.linear[0], state.last]
    return [(each.dtype, each.shape, bytes(sealed.raw(each))) for each in arrays if each is not None]


def _parts(rows: object) -> list[mx.array]:
    return list(rows) if isinstance(rows, tuple) else [rows]  # type: ignore[list-item]


def assert_is(found: Found | None, ids: list[int], *, packing: Packing | None = None, mtp: bool = True) -> None:
    assert found is not None and found.length == len(ids)
    expected = read(ids, packing=packing, mtp=mtp)
    assert bytes_of(found.state) == bytes_of(expected)
    assert found.state.rope_delta == expected.rope_delta
    assert [chain.length for chain in found.state.mtp] == [chain.length for chain in expected.mtp]


def opened(folder: Path, identity: str = "this", *, most_bytes: int = PLENTY) -> PrefixFiles:
    return PrefixFiles(folder, identity, most_bytes=most_bytes)


def stored(folder: Path, *keys: list[int], packing: Packing | None = None) -> None:
    files = opened(folder)
    for ids in keys:
        files.put(ids, read(ids, packing=packing))
    files.close()


def pieces(folder: Path) -> set[Path]:
    return set(folder.glob("*.safetensors"))


def manifests(folder: Path) -> set[Path]:
    return set(folder.glob("*.json"))


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of 3 tokens, so that a chain has many."""
    token = 2 * 2 * 2 * 32 + 2 * 2 * 32
    monkeypatch.setattr(prefix_files, "PIECE_BYTES", 3 * token + prefix_files._HEADER_BYTES + 10)


@pytest.mark.parametrize("packing", [None, PACKING])
@pytest.mark.parametrize("length", [1, 2, 300])
def test_a_checkpoint_is_read_back_by_the_next_process(tmp_path: Path, packing: Packing | None, length: int) -> None:
    ids = list(range(1, length + 1))
    stored(tmp_path, ids, packing=packing)
    assert_is(opened(tmp_path).take([*ids, 7], packing=packing, mtp=True), ids, packing=packing)


@pytest.mark.usefixtures("small_pieces")
def test_the_longest_checkpoint_that_begins_a_key_is_read(tmp_path: Path) -> None:
    random, files, held = Random(0), opened(tmp_path), set()
    for _ in range(60):
        ids = [random.randrange(1, 3) for _ in range(random.randrange(1, 14))]
        longest = max((len(key) for key in held if tuple(ids[: len(key)]) == key), default=0)
        found = files.take(ids, mtp=True)
        if longest:
            assert_is(found, ids[:longest])
            assert files.take(ids, mtp=True, longer_than=longest) is None
        else:
            assert found is None
        files.put(ids, read(ids))
        files.flush()
        held.add(tuple(ids))
    files.close()


@pytest.mark.usefixtures("small_pieces")
def test_a_longer_checkpoint_shares_the_pieces_of_a_shorter_one(tmp_path: Path) -> None:
    ids, files, state = list(range(1, 41)), opened(tmp_path), None
    for length in range(1, 41):
        state = read(ids[:length], before=state)
        files.put(ids[:length], state)
        files.flush()
    files.close()
    assert len(manifests(tmp_path)) == 40
    # Of 3 tokens each: those with all tokens, and at each length the last; then the fixed-size parts.
    assert len(pieces(tmp_path)) <= 14 + 40 + 40
    for length in range(1, 41):
        assert_is(opened(tmp_path).take(ids[:length], mtp=True), ids[:length])


def test_pieces_are_of_at_most_32_mib(tmp_path: Path) -> None:
    assert prefix_files.PIECE_BYTES == 32 << 20
    ids = [*range(1, 40_001)]
    stored(tmp_path, ids)
    sizes = sorted(path.stat().st_size for path in pieces(tmp_path))
    assert len(sizes) > 1 and sum(sizes) > 40_000 * 3 * 2 * 32 * 2
    assert sizes[-1] <= 32 << 20
    assert_is(opened(tmp_path).take(ids, mtp=True), ids)


def test_other_models_precisions_and_formats_are_never_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = [1, 2, 3]
    stored(tmp_path, ids)
    assert opened(tmp_path, "that").take(ids, mtp=True) is None
    assert opened(tmp_path).take(ids, mtp=False) is None
    assert opened(tmp_path).take(ids, mtp=True, packing=PACKING) is None
    assert opened(tmp_path).take([3, 2, 1], mtp=True) is None
    with monkeypatch.context() as newer:
        newer.setattr(prefix_writer, "NAMES", "v2-")
        newer.setattr(prefix_files, "VERSION", 2)
        assert opened(tmp_path).take(ids, mtp=True) is None
        stored(tmp_path, [7])
    assert opened(tmp_path).take([7], mtp=True) is None
    assert_is(opened(tmp_path).take(ids, mtp=True), ids)
    assert len(list(tmp_path.glob("v2-*"))) == 3


@DAMAGED
@pytest.mark.usefixtures("small_pieces")
def test_every_changed_byte_makes_a_checkpoint_a_miss(tmp_path: Path) -> None:
    random, ids = Random(0), [1, 2, 3, 4, 5]
    stored(tmp_path, ids)
    good = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for path in [*pieces(tmp_path), *manifests(tmp_path)]:
        content = good[path]
        for at in {0, len(content) - 1, *(random.randrange(len(content)) for _ in range(40))}:
            path.write_bytes(content[:at] + bytes([content[at] ^ random.randrange(1, 256)]) + content[at + 1 :])
            files = opened(tmp_path)
            assert files.take(ids, mtp=True) is None
            assert not manifests(tmp_path)
            # What was damaged is gone, so that it is written anew.
            files.put(ids, read(ids))
            files.close()
            assert_is(opened(tmp_path).take(ids, mtp=True), ids)
            for each, data in good.items():
                each.write_bytes(data)


@DAMAGED
def test_cut_off_and_missing_files_make_a_checkpoint_a_miss(tmp_path: Path) -> None:
    ids = [1, 2, 3, 4, 5]
    stored(tmp_path, ids)
    good = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for path in [*pieces(tmp_path), *manifests(tmp_path)]:
        for content in (b"", good[path][:-1], good[path] + b" ", b"[]", b"{}", b"[" * 100_000, None):
            path.unlink()
            if content is not None:
                path.write_bytes(content)
            assert opened(tmp_path).take(ids, mtp=True) is None
            for each, data in good.items():
                each.write_bytes(data)
    assert_is(opened(tmp_path).take(ids, mtp=True), ids)


@DAMAGED
def test_a_manifest_under_anothers_name_is_a_miss(tmp_path: Path) -> None:
    stored(tmp_path, [1, 2, 3])
    first = next(iter(manifests(tmp_path)))
    stored(tmp_path, [4, 5, 6])
    second = next(iter(manifests(tmp_path) - {first}))
    second.write_bytes(first.read_bytes())
    assert opened(tmp_path).take([4, 5, 6], mtp=True) is None
    assert_is(opened(tmp_path).take([1, 2, 3], mtp=True), [1, 2, 3])


@pytest.mark.usefixtures("small_pieces")
def test_the_least_recently_used_go_at_the_limit(tmp_path: Path) -> None:
    keys = [[number] * 20 for number in range(1, 9)]
    stored(tmp_path, keys[0])
    one = sum(path.stat().st_size for path in tmp_path.iterdir())
    files = opened(tmp_path, most_bytes=3 * one + one // 2)
    for age, ids in enumerate(keys):
        files.put(ids, read(ids))
        files.flush()
        for path in manifests(tmp_path):
            os.utime(path, ns=(0, path.stat().st_mtime_ns - 10**9))
        if age >= 1:
            assert_is(files.take(keys[1], mtp=True), keys[1])
        assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= files.most_bytes
    files.close()
    held = [ids for ids in keys if opened(tmp_path).take(ids, mtp=True)]
    assert held == [keys[1], *keys[-2:]]


@pytest.mark.usefixtures("small_pieces")
def test_what_a_longer_checkpoint_still_lists_stays(tmp_path: Path) -> None:
    ids = list(range(1, 41))
    stored(tmp_path, ids[:20], ids)
    for path in manifests(tmp_path):
        age = 100 if path.name.startswith("v1-20-") else 50
        os.utime(path, (time.time() - age,) * 2)
    files = opened(tmp_path, most_bytes=sum(path.stat().st_size for path in tmp_path.iterdir()))
    files.put([50, 51], read([50, 51]))
    files.close()
    assert opened(tmp_path).take(ids[:20], mtp=True) is None
    assert_is(opened(tmp_path).take(ids, mtp=True), ids)


@pytest.mark.usefixtures("small_pieces")
def test_a_checkpoint_whose_pieces_another_process_removed_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = prefix_writer._locked

    def after_removing(folder: Path) -> object:
        min(pieces(folder)).unlink()
        return original(folder)

    monkeypatch.setattr(prefix_writer, "_locked", after_removing)
    stored(tmp_path, [1, 2, 3, 4])
    assert not manifests(tmp_path)


def test_damage_costs_one_warning(tmp_path: Path) -> None:
    keys = [[1, 2, 3], [4, 5, 6]]
    stored(tmp_path, *keys)
    for path in pieces(tmp_path):
        path.write_bytes(path.read_bytes()[:-1])
    files = opened(tmp_path)
    with pytest.warns(RuntimeWarning, match="Damaged files in .* are removed .* is read again") as warned:
        assert [files.take(key, mtp=True) for key in keys] == [None, None]
    assert len(warned) == 1


def test_what_another_process_removed_is_no_damage(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    stored(tmp_path, [1, 2, 3])
    for path in pieces(tmp_path):
        path.unlink()
    assert opened(tmp_path).take([1, 2, 3], mtp=True) is None
    assert not recwarn.list


def test_of_a_growing_answer_only_the_longest_is_written(tmp_path: Path) -> None:
    files, ids, state = opened(tmp_path), [1, 2, 3, 4], read([1, 2, 3, 4])
    files.put(ids, state, "prompt")
    for token in range(5, 9):
        ids = [*ids, token]
        state = read(ids, before=state)
        files.put(ids, state, "answer")
    files.put([9, 9], read([9, 9]), "answer")
    files.close()
    assert sorted(prefix_writer.length_of(path) for path in manifests(tmp_path)) == [2, 4, 8]


def test_a_writer_ends_with_those_who_used_it(tmp_path: Path) -> None:
    files = opened(tmp_path)
    writer = files._writer
    files.put([1, 2, 3], read([1, 2, 3]))
    files.flush()
    del files
    gc.collect()
    writer.join(10)
    assert not writer.is_alive()


def test_what_is_larger_than_the_limit_is_not_written(tmp_path: Path) -> None:
    files = opened(tmp_path, most_bytes=1000)
    files.put([1] * 500, read([1] * 500))
    files.close()
    assert not pieces(tmp_path)


def test_handing_over_does_not_wait_for_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = threading.Event()
    original = sealed.write_whole

    def slow(*arguments: object) -> None:
        assert free.wait(30)
        original(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(sealed, "write_whole", slow)
    files, keys = opened(tmp_path), [[1, 2], [3, 4], [5, 6]]
    for ids in keys:
        files.put(ids, read(ids))
    start = time.perf_counter()
    for _ in range(100):
        assert files.advance()
    assert time.perf_counter() - start < 5
    assert not manifests(tmp_path)
    free.set()
    files.close()
    assert len(manifests(tmp_path)) == 3


def test_what_a_state_becomes_later_does_not_reach_the_disk(tmp_path: Path) -> None:
    files, ids = opened(tmp_path), [1, 2, 3]
    state = read(ids)
    files.put(ids, state)
    longer = state
    for token in range(10, 40):
        ids = [*ids, token]
        longer = read(ids, before=longer)
        files.advance()
    files.close()
    assert_is(opened(tmp_path).take(ids, mtp=True), [1, 2, 3])


def test_a_full_disk_costs_one_warning_and_no_wrong_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_pieces: None
) -> None:
    stored(tmp_path, [1, 2, 3, 4])
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for writes in range(9):
        files, ids, others = opened(tmp_path), list(range(100, 120)), list(range(200, 220))
        with monkeypatch.context() as full:
            full.setattr(sealed, "write_whole", filling(sealed.write_whole, writes))
            with pytest.warns(RuntimeWarning, match="No space left on device.*Free some space") as warned:
                files.put(ids, read(ids))
                files.put(others, read(others))
                files.close()
        assert len(warned) == 1
        assert {path: path.read_bytes() for path in before} == before
        assert not [path for path in tmp_path.iterdir() if sealed.is_temporary(path)]
        assert opened(tmp_path).take(ids, mtp=True) is None
        assert_is(opened(tmp_path).take([1, 2, 3, 4], mtp=True), [1, 2, 3, 4])
    stored(tmp_path, ids)
    assert_is(opened(tmp_path).take(ids, mtp=True), ids)


def filling(original: object, writes: int) -> object:
    """A disk with room for so many files and half of another."""
    done = []

    def write(path: Path, chunks: list[bytes]) -> None:
        done.append(1)
        if len(done) <= writes:
            original(path, chunks)  # type: ignore[operator]
            return

        def cut_off() -> object:
            yield bytes(chunks[0])[:10]
            raise OSError(28, "No space left on device")

        original(path, cut_off())  # type: ignore[operator]

    return write


WRITER = """
import sys
sys.path.insert(0, {root!r})
from pathlib import Path
from tests.engine import test_prefix_files as test
test.prefix_files.PIECE_BYTES = 3 * 384 + test.prefix_files._HEADER_BYTES + 10
files = test.opened(Path(sys.argv[1]), most_bytes=int(sys.argv[3]))
print("begun", flush=True)
for number in range(10_000):
    ids = [number % 7 + 1] * (number % 40 + 1) + [int(sys.argv[2])] * 5
    files.put(ids, test.read(ids))
    files.flush()
    print(" ".join(map(str, ids)), flush=True)
"""


def start_writer(folder: Path, name: int, most_bytes: int = PLENTY) -> "subprocess.Popen[str]":
    program = WRITER.format(root=str(ROOT))
    return subprocess.Popen(
        [sys.executable, "-c", program, str(folder), str(name), str(most_bytes)], stdout=subprocess.PIPE, text=True
    )


def wait_for(process: "subprocess.Popen[str]") -> None:
    assert process.stdout is not None and process.stdout.readline() == "begun\n"


def whole_lines(process: "subprocess.Popen[str]") -> list[list[int]]:
    """The tokens of each checkpoint that an ended writer said it has written."""
    said = process.communicate()[0]
    return [[int(token) for token in line.split()] for line in said[: said.rfind("\n") + 1].splitlines()]


def assert_nothing_is_wrong(folder: Path, said: list[list[int]]) -> int:
    """How many of the checkpoints that were said to be written are there; all are what they are called."""
    files, there = opened(folder), 0
    for ids in said:
        found = files.take(ids, mtp=True)
        if found is not None:
            assert_is(found, ids[: found.length])
            there += found.length == len(ids)
    files.close()
    return there


def test_killed_at_any_moment_the_next_start_is_right(tmp_path: Path) -> None:
    random, said = Random(0), []
    for _ in range(6):
        process = start_writer(tmp_path, 8)
        wait_for(process)
        time.sleep(random.random() * 0.7)
        process.send_signal(signal.SIGKILL)
        said += whole_lines(process)
        some = random.sample(said, min(len(said), 30))
        assert assert_nothing_is_wrong(tmp_path, some) == len(some)
    assert len(said) > 6
    old = time.time() - 10_000
    for path in [*pieces(tmp_path), *tmp_path.glob(".*")]:
        os.utime(path, (old, old))
    stored(tmp_path, [5, 5])
    listed = {name for path in manifests(tmp_path) for name in json.loads(path.read_text())["pieces"]}
    assert {path.name for path in pieces(tmp_path)} == listed
    assert not list(tmp_path.glob(".*"))


def test_two_processes_in_one_folder_do_not_harm_each_other(tmp_path: Path) -> None:
    limit = 60_000
    processes = [start_writer(tmp_path, name, limit) for name in (8, 9)]
    for process in processes:
        wait_for(process)
    time.sleep(2)
    said = []
    for process in processes:
        process.send_signal(signal.SIGKILL)
        said += whole_lines(process)
    assert {ids[-1] for ids in said} == {8, 9}
    assert assert_nothing_is_wrong(tmp_path, said[-60:]) > 0
    files = opened(tmp_path, most_bytes=limit)
    files.put([6, 6], read([6, 6]))
    files.close()
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= limit
    assert np.all([path.stat().st_size > 0 for path in pieces(tmp_path)])
