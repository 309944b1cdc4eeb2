"""A size means the same wherever it is read: GB 10^9 bytes, GiB 2^30, and a Mac what it is sold with."""

import pytest

from mlx_qwen.errors import ConversionError, PlanningError
from mlx_qwen.machine import memory_bytes
from mlx_qwen.sizes import bytes_of


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("16GB", 16 * 10**9),
        ("16 gb", 16 * 10**9),
        ("16GiB", 16 * 2**30),
        ("1.5 gib", 3 << 29),
        ("800MB", 8 * 10**8),
        ("64KiB", 65536),
        ("2TB", 2 * 10**12),
        ("12345", 12345),
        (12345, 12345),
    ],
)
def test_a_size_is_read_as_disks_and_the_hub_count_it(text: int | str, nbytes: int) -> None:
    assert bytes_of(text, "target_size", ConversionError) == nbytes


@pytest.mark.parametrize("size", ["16G", "much", "0GB", "-1", -5, "", "1e3GB", "nan", "9" * 400 + "GB", "0.0001"])
def test_what_is_no_size_is_told_every_unit(size: int | str) -> None:
    with pytest.raises(ConversionError, match=r"target_size is .*expected a positive number of bytes.* GB .*GiB.*16GB"):
        bytes_of(size, "target_size", ConversionError)


@pytest.mark.parametrize("memory", ["24GB", "24 GiB", "24.0gb", 24 * 2**30])
def test_a_mac_of_24_gb_has_24_gib(memory: int | str) -> None:
    assert memory_bytes(memory, PlanningError) == 24 * 2**30


@pytest.mark.parametrize("memory", ["24", "24G", "10MB", "lots", "", "0GB", 0])
def test_what_is_no_memory_of_a_mac_is_told_how_they_are_sold(memory: int | str) -> None:
    with pytest.raises(PlanningError, match=r"memory is .*expected .*GB"):
        memory_bytes(memory, PlanningError)
