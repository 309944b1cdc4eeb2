"""The doctor tells what the machine is, and whether its kernels can be trusted."""

from pathlib import Path

import mlx.core as mx
import pytest
from click.testing import CliRunner

from metal_kernels import _build
from mlx_qwen.cli import main
from tests.metal_emulator import emulated
from tests.support.metal_devices import Device, running_on


def test_a_machine_without_a_gpu_is_told_that_references_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mx.metal, "is_available", lambda: False)
    result = CliRunner().invoke(main, ["doctor"])
    assert result.exit_code == 0
    assert "mlx-lm" in result.output
    assert "not run" in result.output


def test_every_kernel_is_probed_where_there_is_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    with emulated():
        result = CliRunner().invoke(main, ["doctor", "--repeats", "1"])
    assert result.exit_code == 0, result.output
    assert result.output.count("equal") >= 10
    assert "gated_delta_mixer" in result.output


def test_a_kernel_that_cannot_be_trusted_is_named_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    text = _build.source_text
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(_build, "source_text", lambda file: text(file).replace("* inverse * weight", "* weight"))
    _build._built.cache_clear()
    with emulated():
        result = CliRunner().invoke(main, ["doctor", "--repeats", "1"])
    _build._built.cache_clear()
    assert result.exit_code == 1
    assert "differs" in result.output
    assert "MLX_QWEN_KERNELS=reference" in result.output


def test_tuning_prints_what_was_measured_and_remembers_it(
    chat_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    device = Device(computes_wrongly=frozenset({"_gated_delta_replay"}))
    monkeypatch.setattr("metal_kernels.tuning.seconds_of", device.clock)
    monkeypatch.setattr("mlx_qwen.cli.doctor._probed", lambda repeats: True)
    with running_on(device):
        result = CliRunner().invoke(main, ["doctor", "--tune", "--model", str(chat_folder)])
    assert result.exit_code == 0, result.output
    assert "on Apple M0" in result.output
    (line,) = [line for line in result.output.splitlines() if line.startswith("roll_back")]
    assert "left out: differs by" in line
    assert len(list((tmp_path / "mlx-qwen" / "kernels").glob("*.json"))) == 1
