"""What the index gives back is the state of exactly these tokens, as much of them as it holds, within its budget."""

from random import Random
from weakref import ref

import mlx.core as mx
import numpy as np
import pytest

from mlx_qwen.engine.prefix import Found, PrefixIndex, prefix_key
from mlx_qwen.engine.radix import RadixTree, forget
from mlx_qwen.model.chain import Chain
from mlx_qwen.model.state import LinearState, State

PLENTY = 1 << 40
FIXED = 4 * (3 + 5 + 7)  # bytes of the fixed-size part of the states made here
BUFFER = 4 * 2 * 2 * 4 * 256  # bytes of their keys and values: two layers of 4 channels, in steps of 256 tokens


def empty() -> State:
    return State((Chain.empty(2),), mtp=(Chain.empty(1),))


def after(state: State, ids: list[int]) -> State:
    """The state with `ids` more, in which every row tells its token, and the fixed-size part their sum."""
    rows = mx.broadcast_to(mx.array(ids, mx.float32)[:, None], (2, 1, 1, len(ids), 4))
    chain, mtp = state.chains[0].grown(len(ids)), state.mtp[0].grown(len(ids))
    for layer in range(2):
        chain.write(layer, rows)
    mtp.write(0, rows)
    total = sum(ids) + (state.linear[0].state[0].item() if state.linear else 0)
    grown = State(
        (chain,), (LinearState(mx.full((3,), total), mx.full((5,), total)),), None, None, mx.full((7,), total), (mtp,)
    )
    mx.eval(grown.arrays())
    return grown


def read(ids: list[int]) -> State:
    return after(empty(), ids)


def assert_remembers(state: State, ids: list[int]) -> None:
    for chain, layers in ((state.chains[0], 2), (state.mtp[0], 1)):
        for layer in range(layers):
            rows = chain.read(layer)
            assert isinstance(rows, mx.array)
            assert np.array(rows)[1, 0, 0, :, 3].tolist() == ids
    assert state.last is not None
    assert state.linear[0].state[0].item() == state.last[0].item() == sum(ids)


def length(found: Found | None) -> int:
    return 0 if found is None else found.length


def shared(left: list[int], right: list[int]) -> int:
    return next(
        (i for i, pair in enumerate(zip(left, right, strict=False)) if pair[0] != pair[1]), min(len(left), len(right))
    )


def test_the_longest_checkpoint_that_begins_a_key_is_found() -> None:
    random, index, held = Random(0), PrefixIndex(PLENTY), set()
    for _ in range(400):
        ids = [random.randrange(1, 3) for _ in range(random.randrange(1, 14))]
        longest = max((len(key) for key in held if tuple(ids[: len(key)]) == key), default=0)
        common = max((shared(list(key), ids) for key in held), default=0)
        assert index.longest_common(ids) == common
        found = index.take(ids)
        assert length(found) == longest
        if found is not None:
            assert_remembers(found.state, ids[:longest])
        if random.random() < 0.3:
            index.insert(ids, read(ids))
            held.add(tuple(ids))
        assert len(index) == len(held)


class Session:
    """A client that goes on with, edits, or repeats what it sent, served as an engine does it."""

    def __init__(self, index: PrefixIndex, random: Random) -> None:
        self.index = index
        self.random = random
        self.ids: list[int] = []
        self.question = 0

    def request(self) -> list[int]:
        """The next prompt; `question` tells where its last question ends."""
        what = self.random.randrange(5)
        if what == 0:
            self.ids = self.ids[: self.question]
        elif what == 1:
            self.ids = self.ids[: self.random.randrange(len(self.ids) + 1)]
        self.ids = self.ids + self.tokens(40)
        if what != 2:
            self.question = len(self.ids)
        self.ids = self.ids + self.tokens(5)
        return self.ids

    def tokens(self, most: int) -> list[int]:
        return [self.random.randrange(1, 3) for _ in range(self.random.randrange(1, most))]

    def serve(self, prompt: list[int]) -> tuple[int, list[tuple[list[int], State]]]:
        """How many tokens were reused, and what was handed to the index."""
        found = self.index.take(prompt)
        at, state = (0, empty()) if found is None else found
        if found is not None:
            assert_remembers(state, prompt[:at])
        given = []
        for end in sorted({self.question, len(prompt)}):
            if end > at:
                state, at = after(state, prompt[at:end]), end
                self.index.insert(prompt[:end], state, "prompt" if end <= self.question else "answer")
                given.append((prompt[:end], state))
        answer = self.tokens(30)
        for token in answer:
            state = after(state, [token])
        self.ids = prompt + answer
        self.index.insert(self.ids, state, "answer")
        return length(found), [*given, (self.ids, state)]


@pytest.mark.parametrize("seed", range(6))
def test_whatever_sessions_do_no_state_is_wrong_and_the_budget_holds(seed: int) -> None:
    random = Random(seed)
    budget = random.choice([5_000, 60_000, 200_000, PLENTY])
    index = PrefixIndex(budget)
    sessions = [Session(index, random) for _ in range(3)]
    chains: list[ref[Chain]] = []
    for _ in range(60):
        session = random.choice(sessions)
        _, given = session.serve(session.request())
        assert index.nbytes <= budget
        chains += [ref(state.chains[0]) for _, state in given]
        del given
        index.shed(budget)
        held = [chain() for chain in chains]
        alive = {id(chain): chain for chain in held if chain is not None}
        buffers = {id(part): part.nbytes for chain in alive.values() for part in chain.buffers()}
        # The MTP layer's chain has half the layers of the other.
        assert index.nbytes == len(index) * FIXED + sum(buffers.values()) * 3 // 2 <= budget
        assert len(index) == len(alive)
        del held, alive
    assert budget < PLENTY or len(index) > 60


def test_nothing_is_copied_when_a_session_goes_on() -> None:
    index, ids = PrefixIndex(PLENTY), [1, 2, 3]
    index.insert(ids, read(ids), "prompt")
    for turn in range(20):
        found = index.take([*ids, 7])
        assert found is not None and found.length == len(ids)
        assert not found.state.chains[0].is_shared
        buffers = found.state.chains[0].buffers()
        question = [*ids, 7, turn]
        state = after(found.state, [7, turn])
        index.insert(question, state, "prompt")
        ids = [*question, 8, 9]
        index.insert(ids, after(state, [8, 9]), "answer")
        del found, state
        taken = index.take(ids)
        assert taken is not None and taken.state.chains[0].buffers()[0] is buffers[0]
    assert index.nbytes == len(index) * FIXED + BUFFER * 3 // 2


def test_another_way_than_the_answers_takes_the_chain_over() -> None:
    index, prompt = PrefixIndex(PLENTY), [1, 2, 3, 4]
    state = read(prompt)
    index.insert(prompt, state, "prompt")
    for step in range(3):
        state = after(state, [5, step])
        index.insert([*prompt, *[each for i in range(step + 1) for each in (5, i)]], state, "answer")
    del state
    assert len(index) == 4
    for key in ([*prompt, 9], prompt):
        found = index.take(key)
        assert found is not None and found.length == 4
        assert not found.state.chains[0].is_shared
        assert len(index) == 1


def test_a_prompt_behind_is_kept_and_the_other_way_gets_a_copy() -> None:
    index, system = PrefixIndex(PLENTY), [1, 2, 3, 4]
    first = read(system)
    index.insert(system, first, "prompt")
    index.insert([*system, 5], after(first, [5]), "prompt")
    index.insert([*system, 5, 6], after(read([*system, 5]), [6]), "answer")
    del first
    found = index.take([*system, 9])
    assert found is not None and found.state.chains[0].is_shared
    assert_remembers(after(found.state, [9]), [*system, 9])
    kept = index.take([*system, 5, 6, 7])
    assert kept is not None and kept.length == 6
    assert_remembers(kept.state, [*system, 5, 6])


def test_an_answer_in_other_buffers_is_kept() -> None:
    index = PrefixIndex(PLENTY)
    index.insert([1, 2], read([1, 2]), "prompt")
    index.insert([1, 2, 3], read([1, 2, 3]), "answer")
    found = index.take([1, 2, 9])
    assert found is not None and not found.state.chains[0].is_shared
    assert length(index.take([1, 2, 3])) == 3


def test_only_what_was_used_counts_as_recent() -> None:
    apart = [[token, *[token] * 5] for token in (1, 2, 3)]
    one = FIXED + BUFFER * 3 // 2
    index = PrefixIndex(3 * one)
    for ids in apart:
        index.insert(ids, read(ids), "prompt")
    longer = [*apart[0], 8]
    assert length(index.take(apart[0])) == 6
    assert length(index.take(longer)) == 6
    index.insert([9], read([9]), "prompt")
    assert [length(index.take(ids)) for ids in [*apart, [9]]] == [6, 0, 6, 1]


def test_using_a_long_checkpoint_does_not_keep_the_shorter_ones_on_its_way() -> None:
    index = PrefixIndex(PLENTY)
    state = read([1, 2])
    index.insert([1, 2], state, "prompt")
    index.insert([7], read([7]), "prompt")
    index.insert([1, 2, 3], after(state, [3]), "prompt")
    assert length(index.take([1, 2, 3, 4])) == 3
    index.shed(index.nbytes - 1)
    assert length(index.take([1, 2])) == 0
    assert length(index.take([7])) == 1
    assert length(index.take([1, 2, 3])) == 3


def test_the_steps_of_a_tool_loop_go_before_the_question_that_it_answers() -> None:
    index, ids = PrefixIndex(PLENTY), [1, 2, 3]
    state = read(ids)
    index.insert(ids, state, "prompt")
    for step in range(20):
        ids = [*ids, 4, step]
        state = after(state, [4, step])
        index.insert(ids, state, "answer")
    del state
    index.shed(3 * FIXED + BUFFER * 3 // 2)
    assert len(index) == 3
    assert length(index.take(ids)) == len(ids)
    assert length(index.take([1, 2, 3])) == 3


def test_a_short_checkpoint_does_not_keep_the_buffers_of_a_long_one() -> None:
    system, long = [1, 2, 3], [1, 2, 3, *[4] * 3000]
    index = PrefixIndex(PLENTY)
    state = read(system)
    index.insert(system, state, "prompt")
    index.insert(long, after(state, long[3:]), "prompt")
    del state
    assert length(index.take([*system, 9])) == 3
    whole = index.nbytes
    index.shed(whole // 4)
    found = index.take([*system, 9])
    assert found is not None and found.length == 3
    assert index.nbytes == FIXED + BUFFER * 3 // 2
    assert_remembers(after(found.state, [9]), [*system, 9])


def test_nothing_is_copied_of_buffers_that_a_request_is_writing() -> None:
    system, long = [1, 2, 3], [1, 2, 3, *[4] * 3000]
    index, state = PrefixIndex(PLENTY), read(system)
    index.insert([7], read([7]), "prompt")
    index.insert(system, state, "prompt")
    running = after(state, long[3:])
    index.shed(index.nbytes - 1)
    found = index.take(system)
    assert found is not None and found.state.chains[0].buffers()[0] is running.chains[0].buffers()[0]


def test_of_an_entry_larger_than_the_budget_the_checkpoints_that_fit_are_held() -> None:
    ids = list(range(1, 6001))
    index = PrefixIndex(6 * BUFFER)
    state = empty()
    for start in range(0, 6000, 500):
        state = after(state, ids[start : start + 500])
        index.insert(ids[: start + 500], state, "prompt")
        assert index.nbytes <= 6 * BUFFER
    del state
    index.insert([7], read([7]), "prompt")
    found = index.take(ids)
    assert found is not None and 500 <= found.length < 6000
    assert_remembers(found.state, ids[: found.length])
    assert index.nbytes <= 6 * BUFFER


def test_what_is_larger_than_the_budget_moves_nothing_else_out() -> None:
    index = PrefixIndex(4 * BUFFER)
    index.insert([1], read([1]), "prompt")
    index.insert([2] * 2000, read([2] * 2000), "prompt")
    assert (len(index), length(index.take([1])), length(index.take([2] * 2000))) == (1, 1, 0)


def test_a_prompt_stays_a_prompt_when_an_answer_ends_there() -> None:
    index, state = PrefixIndex(PLENTY), read([1, 2])
    index.insert([1, 2], state, "prompt")
    longer = after(state, [3])
    index.insert([1, 2, 3], longer, "prompt")
    index.insert([1, 2, 3], longer, "answer")
    index.take([1, 2, 4])
    assert length(index.take([1, 2, 3])) == 3


def test_clearing_forgets_everything() -> None:
    index = PrefixIndex(PLENTY)
    index.insert([1, 2], read([1, 2]), "prompt")
    assert (len(index), index.nbytes) == (1, FIXED + BUFFER * 3 // 2)
    index.clear()
    assert (len(index), index.nbytes, index.take([1, 2]), index.longest_common([1])) == (0, 0, None, 0)


def test_thousands_of_checkpoints_on_one_way_are_fine() -> None:
    tree: RadixTree[int] = RadixTree()
    for count in range(3000, 0, -1):
        tree.placed([1] * count).value = count
    assert sorted(value for _, value in tree.root.below()) == list(range(1, 3001))
    assert len(tree.matched([1] * 3000)[0]) == 3001
    for count in range(1, 3000):
        forget(tree.placed([1] * count))
    assert [value for _, value in tree.root.below()] == [3000]
    assert len(tree.matched([1] * 3000)[0]) == 2


@pytest.mark.parametrize("key", [[], [1], [1, 2, 3]])
def test_a_state_of_another_length_than_its_key_is_refused(key: list[int]) -> None:
    with pytest.raises(ValueError, match=f"1 sequences and 2 tokens, expected one of {len(key)}"):
        PrefixIndex(PLENTY).insert(key, read([1, 2]), "prompt")


def test_a_batch_is_refused() -> None:
    joined = State.joined([read([1]), read([2])])
    with pytest.raises(ValueError, match="2 sequences"):
        PrefixIndex(PLENTY).insert([1], joined, "prompt")


def test_keys_of_media_tell_content_and_place() -> None:
    ids = [5, 300, 300, 300, 6, 300, 300, 7]
    key = prefix_key(ids, [(1, 3, b"cat"), (5, 2, b"dog")])
    assert key.dtype == np.int64
    assert key[[0, 4, 7]].tolist() == [5, 6, 7]
    assert (key[[1, 2, 3, 5, 6]] < 0).all() and len(set(key.tolist())) == 8
    assert np.array_equal(key, prefix_key(ids, [(1, 3, b"cat"), (5, 2, b"dog")]))
    other = prefix_key(ids, [(1, 3, b"cat"), (5, 2, b"cow")])
    assert np.array_equal(key[:5], other[:5]) and not (key[5:7] == other[5:7]).any()
    moved = prefix_key([8, 9, *ids], [(3, 3, b"cat"), (7, 2, b"dog")])
    assert np.array_equal(moved[2:], key)


def test_keys_of_a_video_tell_its_timestamps() -> None:
    first, second = (prefix_key([301, time, 301], [(0, 3, b"clip")]) for time in (11, 12))
    assert (first == second).tolist() == [True, False, True]


def test_keys_of_text_are_its_ids() -> None:
    assert prefix_key([4, 5, 6]).tolist() == [4, 5, 6]
