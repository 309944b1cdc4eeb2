"""The built-in sizes are the released ones."""

import pytest

from mlx_qwen.checkpoint.names import Role, parameter_count, tensor_specs
from mlx_qwen.checkpoint.released import SIZES, released
from mlx_qwen.errors import ConfigError

# Bytes of the published weight files: 2 a parameter, but 4 for A_log and the gated norm.
PUBLISHED_BYTES = {"0.8B": 1_746_882_752, "4B": 9_319_737_856, "9B": 19_306_216_416, "27B": 55_562_872_800}
PUBLISHED_BYTES |= {"122B-A10B": 250_173_007_840, "397B-A17B": 806_795_875_168}


@pytest.mark.parametrize("name", PUBLISHED_BYTES)
def test_a_size_has_as_many_bytes_as_its_published_files(name: str) -> None:
    specs = tensor_specs(released(name))
    exact = [spec for spec in specs if spec.role is Role.PLAIN_NORM or spec.name.endswith("A_log")]
    assert 2 * parameter_count(specs) + 2 * parameter_count(exact) == PUBLISHED_BYTES[name]


def test_a_size_can_be_cut_to_its_first_layers() -> None:
    whole, cut = released("35B-A3B").text, released("35B-A3B", num_layers=4).text
    assert cut.num_hidden_layers == 4
    assert cut.layer_types == whole.layer_types[:4]
    assert cut.moe == whole.moe


def test_an_unknown_size_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=", ".join(SIZES)):
        released("7B")
