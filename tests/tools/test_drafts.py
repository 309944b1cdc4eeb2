"""The MTP layer is trained on the chains of drafts that the runtime makes, and nothing else changes."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import mlx_qwen
from mlx_qwen.convert import convert
from mlx_qwen.demo import DEMO_FOLDER
from tools.demo_training.data import load
from tools.demo_training.drafting import Settings, train
from tools.demo_training.drafts import drafted, drafting_loss, starts, taught
from tools.demo_training.export import new_model, read_folder, write_folder
from tools.demo_training.model import Batch, DemoModel
from tools.export_demo import export

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="the training layers are compiled by g++")
DEPTH = 3


@pytest.fixture(scope="module")
def model() -> DemoModel:
    """An untrained demo in float32, with weights that bfloat16 holds exactly."""
    torch.manual_seed(0)
    model = new_model(torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_((parameter + 0.02 * torch.randn_like(parameter)).bfloat16())
    return model


@pytest.fixture(scope="module")
def batch() -> Batch:
    """Two rows of sums."""
    whole = load("arithmetic", 0, 0)
    rows = {name: getattr(whole, name)[:2, :40] for name in ("input_ids", "labels", "weights")}
    return replace(whole, **rows, position_ids=whole.position_ids[:, :2, :40].contiguous())


def test_every_chain_gives_the_logits_that_the_runtime_drafts(model: DemoModel, batch: Batch, tmp_path: Path) -> None:
    places = starts(batch.labels, DEPTH)
    with torch.no_grad():
        known = taught(model, batch)
        steps = drafted(model.mtp, known, places, DEPTH, torch.float32)
        expected = np.stack([model.logits(normed).numpy() for normed, _ in steps])
    write_folder(model, tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "mlx", quantize=False, progress=False)
    runtime, _ = mlx_qwen.load(tmp_path / "mlx", dtype=mx.float32)
    compared = 0
    for row in range(2):
        ids = mx.array(batch.input_ids[row : row + 1].numpy())
        hidden = runtime.hidden_states(ids)
        for place, start in enumerate(places[row].tolist()):
            if start + DEPTH >= ids.shape[1]:
                continue
            memory = runtime.mtp_step(hidden[:, :start], ids[:, 1 : start + 1]).memory
            draft = runtime.mtp_step(hidden[:, start : start + 1], ids[:, start + 1 : start + 2], memory)
            found = [np.array(draft.logits[0, 0])]
            for step in range(1, DEPTH):
                following = ids[:, start + step + 1 : start + step + 2]
                draft = runtime.mtp_step(draft.normed, following, draft.memory, chained=True)
                found.append(np.array(draft.logits[0, 0]))
            np.testing.assert_allclose(np.stack(found), expected[:, row, place], atol=1e-3, rtol=1e-3)
            compared += 1
    assert compared > 20


def test_chains_start_wherever_they_reach_what_is_learnt(batch: Batch) -> None:
    labels = torch.full((2, 12), -100)
    labels[0, 5:7], labels[1, 11] = 3, 3
    assert starts(labels, 1).tolist() == [[3, 4], [9, 11]]
    assert starts(labels, 3).tolist() == [[1, 2, 3, 4], [7, 8, 9, 11]]


def test_a_loss_without_a_chain_is_the_distance_of_first_drafts(model: DemoModel, batch: Batch) -> None:
    known = taught(model, batch)
    with torch.no_grad():
        drafts, _ = model.mtp(known.normed, known.embeddings.roll(-1, 1), known.rotary, torch.float32)
        likely = model.logits(drafts)[:, :-2].log_softmax(-1)
        distances = -(known.logits[:, 1:-1].softmax(-1) * likely).sum(-1)
        counted = batch.labels[:, 2:] >= 0
        weights = batch.weights[:, 2:][counted]
        expected = (distances[counted] * weights).sum() / weights.sum()
        right = (likely.argmax(-1) == known.logits[:, 1:-1].argmax(-1))[counted].float().mean()
        outcome = drafting_loss(model, batch, depth=1)
    # The rest is the router's balance, a thousandth of a loss.
    assert abs(outcome.loss - expected) < 0.01
    assert outcome.right == [pytest.approx(right.item())]


def test_training_changes_the_layer_and_not_a_bit_of_anything_else(tmp_path: Path) -> None:
    export(DEMO_FOLDER, tmp_path / "source")
    trained = train(Settings(tmp_path / "run", tmp_path / "source", steps=2, log=1))
    before, after = (
        load_file(folder / "model.safetensors") for folder in (tmp_path / "source", tmp_path / "run" / "hf")
    )
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(name.startswith("mtp.") for name in changed)
    assert all(parameter.requires_grad for parameter in trained.mtp.parameters())
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]


def test_a_folder_is_read_as_the_model_that_wrote_it(model: DemoModel, tmp_path: Path) -> None:
    write_folder(model, tmp_path)
    again = read_folder(tmp_path, torch.float32)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
