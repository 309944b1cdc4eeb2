"""Training goes on where it stopped, on data that depends on the seed alone."""

import shutil
from pathlib import Path

import pytest
import torch

from tools.demo_training.batches import KINDS
from tools.demo_training.data import answer_weights, load
from tools.demo_training.optimizer import orthogonalized
from tools.demo_training.recipe import PHASES, weights_at
from tools.demo_training.tokenizer import token_id
from tools.demo_training.training import Settings, Trainer, saved

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="the training layers are compiled by g++")


def test_a_run_that_is_interrupted_ends_with_the_weights_of_one_that_is_not(tmp_path: Path) -> None:
    """Both in one process, where no order of additions differs."""
    torch.set_num_threads(1)
    whole = Settings(tmp_path / "whole", workers=1, steps=2, parts=1, save=1)
    whole.run.mkdir()
    uninterrupted = Trainer(whole, rank=0)
    uninterrupted.run()
    stopped = Settings(tmp_path / "stopped", workers=1, steps=2, parts=1, save=1)
    stopped.run.mkdir()
    shutil.copy(saved(whole.run)[0], stopped.run)
    resumed = Trainer(stopped, rank=0)
    assert resumed.step == 1
    resumed.run()
    torch.testing.assert_close(resumed.optimizer.values, uninterrupted.optimizer.values, rtol=0, atol=1e-6)
    assert resumed.draws == uninterrupted.draws


def test_workers_and_draws_never_share_rows() -> None:
    batches = [load("recall_short", 0, draw, worker, workers=2) for draw in range(5) for worker in range(2)]
    rows = {tuple(row.tolist()) for batch in batches for row in batch.input_ids}
    assert len(rows) == sum(len(batch.input_ids) for batch in batches)


@pytest.mark.parametrize("kind", ["picture", "pictures", "clip", "drills", "counted", "changing"])
def test_a_slice_holds_the_patches_of_its_own_placeholders(kind: str) -> None:
    media = torch.tensor([token_id(name) for name in ("<|image_pad|>", "<|video_pad|>")])
    slices = [load(kind, 3, draw) for draw in range(4)]
    for part in slices:
        assert part.pixels is not None
        patches = sum(height * width for height, width in part.grids)
        assert len(part.pixels) == patches == 4 * torch.isin(part.input_ids, media).sum()
    assert len({len(part.input_ids) for part in slices}) == 1


def test_a_short_answer_counts_more_than_a_long_one_and_two_answers_are_told_apart() -> None:
    labels = torch.tensor([[-100, 5, -100, 5, 5, 5, 5, -100], [5, 5, 5, 5, -100, -100, 5, -100]])
    weights = answer_weights(labels)
    assert weights[0, 1] == weights[1, 6] == 1
    assert torch.all(weights[0, 3:7] == weights[1, :4])
    assert 0 < weights[0, 3] < 1


def test_orthogonalized_matrices_keep_their_directions_with_singular_values_near_one() -> None:
    torch.manual_seed(0)
    for rows, columns in ((64, 128), (128, 64)):
        stack = torch.randn(3, rows, columns)
        values = torch.linalg.svdvals(orthogonalized(stack).float())
        assert values.min() > 0.4 and values.max() < 1.4


def test_every_phase_of_the_recipe_draws_known_kinds_with_shares_that_add_up() -> None:
    for start, phase in PHASES.items():
        assert phase.keys() <= KINDS.keys()
        assert abs(sum(weights_at(start)) - 1) < 1e-9
