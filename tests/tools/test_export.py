"""The folder that training writes: transformers and mlx-qwen read it as the model that was trained."""

import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText

import mlx_qwen
from mlx_qwen.convert import convert
from mlx_qwen.model.multimodal import pixels_of
from tools.demo_training.data import load
from tools.demo_training.export import new_model, write_folder
from tools.demo_training.model import Batch, DemoModel

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="the training layers are compiled by g++")


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
def folder(model: DemoModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("demo")
    write_folder(model, target)
    return target


@pytest.fixture(scope="module")
def batch() -> Batch:
    """One question about a picture."""
    whole = load("picture", 0, 0)
    height, width = whole.grids[0]
    length = int((whole.labels[0] >= 0).nonzero().max()) + 1
    assert whole.pixels is not None
    return Batch(
        whole.input_ids[:1, :length],
        whole.labels[:1, :length],
        whole.position_ids[:, :1, :length].contiguous(),
        whole.pixels[: height * width],
        whole.grids[:1],
        whole.weights[:1, :length],
    )


@pytest.fixture(scope="module")
def logits(model: DemoModel, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    """Of the next tokens and of the MTP layer."""
    with torch.no_grad():
        embeddings, rotary = model.embed(batch), model.rotary(batch)
        normed, _ = model.decode(embeddings, rotary)
        drafts, _ = model.mtp(normed, embeddings.roll(-1, 1), rotary, model.dtype)
        return model.logits(normed).numpy(), model.logits(drafts).numpy()


def test_transformers_reads_the_written_folder_as_the_trained_model(
    folder: Path, batch: Batch, logits: tuple[np.ndarray, np.ndarray]
) -> None:
    theirs = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    kinds = (batch.input_ids == theirs.config.image_token_id).int()
    grids = torch.tensor([[1, *batch.grids[0]]])
    with torch.no_grad():
        found = theirs(
            input_ids=batch.input_ids, pixel_values=batch.pixels, image_grid_thw=grids, mm_token_type_ids=kinds
        ).logits
    np.testing.assert_allclose(found.numpy(), logits[0], atol=1e-4, rtol=1e-4)


def test_the_converted_folder_gives_the_logits_that_were_trained_and_drafted(
    folder: Path, batch: Batch, logits: tuple[np.ndarray, np.ndarray], tmp_path: Path
) -> None:
    convert(folder, tmp_path / "mlx", quantize=False, progress=False)
    model, _ = mlx_qwen.load(tmp_path / "mlx", dtype=mx.float32)
    assert (model.mtp_reads, model.mtp_unsettled) == ("normed", None)
    assert batch.pixels is not None
    ids, cache = mx.array(batch.input_ids.numpy()), model.make_cache()
    pixels = pixels_of(mx.array(batch.pixels.numpy()), mx.array([[1, *batch.grids[0]]]), None, None)
    embedded = model.embed(ids, pixels, cache)
    hidden = model.hidden_states(ids, cache, embedded=embedded)
    drafts = model.mtp_logits(hidden, mx.roll(ids, -1, axis=1), embedded=embedded)
    np.testing.assert_allclose(np.array(model.logits(hidden)), logits[0], atol=1e-3, rtol=1e-3)
    # What follows the last token is not the first, as the training model has it; it is never learnt either.
    np.testing.assert_allclose(np.array(drafts)[:, :-1], logits[1][:, :-1], atol=1e-3, rtol=1e-3)
