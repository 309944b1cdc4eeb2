"""MLX's command buffers hold what suits the chip: before MLX asks, never over the user's own, and as was measured."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from mlx_qwen import command_buffers, machine
from mlx_qwen.bench import command_buffers as trial
from mlx_qwen.bench.process import Timed, Turn
from mlx_qwen.cli import main
from mlx_qwen.command_buffers import SWITCH, VARIABLES, Limits, candidates, facts, set_limits, suited, users_own
from mlx_qwen.errors import MLXQwenError
from tests.support.metal_devices import Device, running_on

GIB = 1 << 30
OPS, MEGABYTES = VARIABLES
MAC = """
import ctypes, hashlib, importlib.metadata, json, os, sys, tempfile
class Library:
    def __init__(self, name): assert name is None
    @staticmethod
    def sysctlbyname(name, text, size, new, new_size):
        assert name == b"machdep.cpu.brand_string"
        text.value = CHIP
        return 0
ctypes.CDLL, sys.platform = Library, "darwin"
import mlx_qwen
print("mlx.core" in sys.modules, *(os.environ.get(f"MLX_MAX_{name}_PER_BUFFER") for name in ("OPS", "MB")))
"""


@pytest.fixture
def mac(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, int], None]:
    """`mac(chip, GiB)`: from now on this is one, on which nothing was set."""

    def become(chip: str, gigabytes: int) -> None:
        for name in (*VARIABLES, SWITCH):
            monkeypatch.setenv(name, "")  # so that it is put back as it was, whatever is set below
            monkeypatch.delenv(name)
        monkeypatch.setattr(command_buffers, "_ours", {})
        for module in (command_buffers, trial):
            monkeypatch.setattr(module, "chip_name", lambda: chip)
            monkeypatch.setattr(module, "machine_bytes", lambda: gigabytes * GIB)

    return become


def values() -> list[str | None]:
    return [os.environ.get(name) for name in VARIABLES]


@pytest.mark.parametrize(
    ("chip", "gigabytes", "limits"),
    [
        ("Apple M1", 8, Limits(1000, 64)),
        ("Apple M1", 16, Limits(1000, 128)),
        ("Apple M2 Pro", 32, Limits(1000, 256)),
        ("Apple M3 Ultra", 512, Limits(1000, 1024)),
        ("Apple M4 Max", 64, Limits(1000, 512)),
        ("Apple M5 Max", 128, None),
        ("Apple M17", 128, None),
        ("Intel(R) Core(TM) i9-9980HK CPU @ 2.40GHz", 64, None),
        ("", 64, None),
    ],
)
def test_limits_grow_with_the_memory_up_to_the_m4(chip: str, gigabytes: int, limits: Limits | None) -> None:
    assert suited(chip, gigabytes * GIB) == limits


def test_what_a_buffer_reads_in_16_bits_is_a_64th_of_the_memory_at_most() -> None:
    for gigabytes in (8, 16, 18, 24, 36, 48, 96, 128, 192, 512):
        for limits in candidates("Apple M2", gigabytes * GIB):
            assert limits is None or 2 * limits.megabytes << 20 <= gigabytes * GIB // 64


@pytest.mark.parametrize("chip", ["Apple M1 Max", "Apple M5"])
def test_they_are_set_when_the_package_is_imported_and_mlx_is_not(chip: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in (*VARIABLES, SWITCH)}
    script = MAC.replace("CHIP", repr(chip.encode()))
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60, env=environment
    )
    limits = suited(chip, machine.machine_bytes())
    wanted = ("None", "None") if limits is None else tuple(map(str, limits))
    assert done.stdout.split() == ["False", *wanted]


def test_only_what_the_user_left_open_is_set(mac: Callable[[str, int], None], monkeypatch: pytest.MonkeyPatch) -> None:
    mac("Apple M1", 16)
    monkeypatch.setenv(MEGABYTES, "50")
    set_limits()
    assert values() == ["1000", "50"]
    assert users_own() == {MEGABYTES: "50"}
    assert [value for _, value in facts()] == ["1000, set by mlx-qwen", "50, set by you"]
    assert MEGABYTES in command_buffers.as_users_have_it()
    assert OPS not in command_buffers.as_users_have_it()


def test_nothing_is_set_off_apple_silicon_or_where_it_is_switched_off(
    mac: Callable[[str, int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    mac("", 64)
    set_limits()
    assert values() == [None, None]
    assert facts() == []
    mac("Apple M1", 64)
    monkeypatch.setenv(SWITCH, "0")
    set_limits()
    assert values() == [None, None]
    assert [value for _, value in facts()] == ["MLX's own"] * 2


def turns(milliseconds: dict[Limits | None, float]) -> trial.Run:
    """A machine on which a token takes so long; limits that are not named fail."""

    def run(limits: Limits | None) -> Turn:
        if limits not in milliseconds:
            raise MLXQwenError("mlx-qwen could not run this model: out of memory")
        return Turn(1.0, 3 * GIB, [Timed(64, 1.0, 100, 0.1 * milliseconds[limits])], {})

    return run


HALF, SUITED = Limits(1000, 64), Limits(1000, 128)


@pytest.mark.parametrize(
    ("milliseconds", "best"),
    [
        ({None: 10, Limits(200, 64): 9.0, HALF: 8, SUITED: 8.5}, HALF),
        ({None: 10, Limits(200, 64): 9.95, HALF: 10, SUITED: 11}, None),
        ({None: 10, HALF: 9}, HALF),
        ({SUITED: 9}, SUITED),
        ({}, None),
    ],
    ids=["the quickest", "mlx's own unless others pay", "without those that fail", "even mlx's own", "nothing runs"],
)
def test_what_was_measured_holds_for_processes_that_follow(
    mac: Callable[[str, int], None],
    checkpoint: Callable[..., Path],
    milliseconds: dict[Limits | None, float],
    best: Limits | None,
) -> None:
    mac("Apple M1", 16)
    tried = trial.tune_command_buffers(checkpoint("dense"), turns(milliseconds))
    assert tried[0].limits == best
    assert {each.limits for each in tried if each.failure} == set(candidates("Apple M1", 16 * GIB)) - set(milliseconds)
    set_limits()
    assert values() == ([None, None] if best is None else [str(value) for value in best])
    mac("Apple M1", 32)
    set_limits()
    assert values() == ["1000", "256"]


def test_a_candidate_runs_in_a_process_with_its_limits(
    mac: Callable[[str, int], None], checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    mac("Apple M1", 16)
    set_limits()
    given = []

    def run_turn(runtime: str, folder: Path, sizes: list[int], count: int, environment: dict[str, str]) -> Turn:
        given.append([environment.get(name) for name in (*VARIABLES, SWITCH)])
        return turns({None: 1, **dict.fromkeys(candidates("Apple M1", 16 * GIB), 1.0)})(None)

    monkeypatch.setattr(trial, "run_turn", run_turn)
    trial.tune_command_buffers(checkpoint("dense"))
    wanted = [[None, None, "0"], ["200", "64", "0"], ["1000", "64", "0"], ["1000", "128", "0"]]
    assert given == wanted * 2


@pytest.mark.parametrize("own", [False, True])
def test_the_doctor_tries_them_unless_they_are_the_users(
    mac: Callable[[str, int], None], chat_folder: Path, monkeypatch: pytest.MonkeyPatch, own: bool
) -> None:
    mac("Apple M1", 16)
    if own:
        monkeypatch.setenv(OPS, "77")
    set_limits()
    device = Device()
    monkeypatch.setattr("metal_kernels.tuning.seconds_of", device.clock)
    monkeypatch.setattr("mlx_qwen.cli.doctor._probed", lambda repeats: True)
    monkeypatch.setattr(trial, "run_turn", lambda *given: turns({None: 10, HALF: 8})(_limits_in(given[-1])))
    with running_on(device):
        result = CliRunner().invoke(main, ["doctor", "--tune", "--model", str(chat_folder)])
    assert result.exit_code == 0, result.output
    if own:
        assert "ops a command buffer  77, set by you" in result.output
        assert f"not tried: {OPS} set by you" in result.output
    else:
        assert "ops a command buffer  1000, set by mlx-qwen" in result.output
        assert "1000 ops, 64 MB, used             8.00 ms" in result.output
        assert "out of memory" in result.output


def _limits_in(environment: dict[str, str]) -> Limits | None:
    found = [int(environment[name]) for name in VARIABLES if name in environment]
    return Limits(*found) if found else None
