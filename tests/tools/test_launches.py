"""mlx-lm's launches are counted by the rule that counts ours."""

import pytest

from tools.benchmarks.launches import compare_launches


# mlx-lm's numbers are those of 0.32.2, give or take how its releases differ.
@pytest.mark.parametrize(
    ("size", "most", "mlx_lm"), [("35B-A3B", 420, 1776), ("9B", 300, 818), ("0.8B", 230, 620)], ids=str
)
def test_a_decoded_token_needs_fewer_launches_than_mlx_lms(size: str, most: int, mlx_lm: int) -> None:
    report = compare_launches(size)
    assert report.peer.total == pytest.approx(mlx_lm, rel=0.05)
    assert report.ours.total <= most
