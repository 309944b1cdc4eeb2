"""The fast training layers against transformers' own modules, values and gradients."""

import shutil
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tools.demo_training.architecture import demo_config
from tools.demo_training.fast import layers
from tools.demo_training.model import Batch, DemoModel

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="the fast layers are compiled by g++")
IMAGE, VIDEO = 7, 8
B, T, HIDDEN = 2, 21, 128
Function = Callable[[Tensor], Tensor]


@pytest.fixture(scope="module")
def model() -> DemoModel:
    """A model in float32 whose norms and decays are not at their start, where mistakes in them would not show."""
    torch.manual_seed(0)
    model = DemoModel(demo_config(IMAGE, VIDEO, 5, 6, 1), dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
            if name.endswith("linear_attn.in_proj_a.weight"):
                parameter.mul_(4)
    return model.eval()


def assert_same(module: nn.Module, mine: Function, theirs: Function) -> None:
    """Both functions of random rows give the same values and the same gradients, of the rows and every parameter."""
    x = torch.randn(B, T, HIDDEN, requires_grad=True)
    outputs, gradients = [], []
    for function in (mine, theirs):
        out = function(x)
        slope = torch.linspace(-1, 1, out.numel()).view(out.shape)
        outputs.append(out)
        gradients.append(torch.autograd.grad((out * slope).sum(), [x, *module.parameters()]))
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * (1 + expected.abs().max().item()))


def test_the_gated_delta_layer_is_transformers_own(model: DemoModel) -> None:
    module = model.base.model.language_model.layers[0].linear_attn
    assert_same(module, lambda x: layers.gated_delta_net(module, x), module)


def test_the_attention_layer_is_transformers_own(model: DemoModel) -> None:
    module = model.base.model.language_model.layers[3].self_attn
    cosine, sine = model.base.model.language_model.rotary_emb(torch.empty(0), torch.randint(0, 30, (3, B, T)))
    rotary = layers.Rotary(cosine.contiguous(), sine.contiguous())
    causal = torch.full((T, T), -torch.inf).triu(1)[None, None]
    assert_same(module, lambda x: layers.attention(module, x, rotary), lambda x: module(x, (cosine, sine), causal)[0])


def test_the_experts_are_transformers_own(model: DemoModel) -> None:
    module = model.base.model.language_model.layers[1].mlp
    assert_same(module, lambda x: layers.sparse_moe(module, x)[0], module)


def test_the_sum_and_its_norm_are_transformers_own(model: DemoModel) -> None:
    norm, delta = model.base.model.language_model.layers[1].input_layernorm, torch.randn(B, T, HIDDEN)

    def mine(x: Tensor) -> Tensor:
        total, normed = layers.add_norm(norm, x, delta, torch.float32)
        return total + 2 * normed

    assert_same(norm, mine, lambda x: x + delta + 2 * norm(x + delta))


def test_the_whole_model_gives_transformers_own_loss_and_gradients(model: DemoModel) -> None:
    """Images of two sizes and a video's grid among text, in rows of different lengths."""
    first = [10, 11, *[IMAGE] * 6, 12, 13, 14, *[VIDEO] * 9, 15, 16, 17]
    second = [20, 21, *[IMAGE] * 4, 22, 23, 24, 25]
    ids = torch.tensor([first, second + [0] * (len(first) - len(second))])
    kinds, mask = (ids == IMAGE).int() + 2 * (ids == VIDEO).int(), (ids > 0).int()
    labels = torch.where(ids < 12, -100, ids)
    video, first_image, second_image = torch.randn(36, 1536), torch.randn(24, 1536), torch.randn(16, 1536)
    image_grids, video_grid = torch.tensor([[1, 4, 6], [1, 4, 4]]), torch.tensor([[1, 6, 6]])
    positions, _ = model.base.model.get_rope_index(ids, kinds, image_grids, video_grid, mask)
    theirs = model.base(
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions,
        pixel_values=torch.cat([first_image, second_image]),
        pixel_values_videos=video,
        image_grid_thw=image_grids,
        video_grid_thw=video_grid,
        labels=labels,
        use_cache=False,
    ).loss
    pixels, grids = torch.cat([first_image, video, second_image]), [(4, 6), (6, 6), (4, 4)]
    batch = Batch(ids, labels, positions, pixels, grids, torch.ones(ids.shape))
    normed, _ = model.decode(model.embed(batch), model.rotary(batch))
    mine, _ = model.cross_entropy(normed, batch, 1)
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    weights = dict(model.base.named_parameters())
    found, expected = (torch.autograd.grad(loss, list(weights.values())) for loss in (mine, theirs))
    for name, a, b in zip(weights, found, expected, strict=True):
        assert (a - b).abs().max() <= 1e-5 + 1e-3 * b.abs().max(), name
