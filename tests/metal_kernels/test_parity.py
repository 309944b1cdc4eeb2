"""The parity probes cover every kernel, pass on sound ones and report broken ones."""

from pathlib import Path

import pytest

import metal_kernels
from metal_kernels import _build
from metal_kernels.parity import Probe, run_probe
from metal_kernels.parity_cases import probes
from tests.metal_emulator import emulated
from tests.metal_emulator import kernel as emulator
from tests.metal_emulator.compiler import check_metal_rules
from tests.metal_emulator.signature import KernelSource, Signature
from tests.metal_emulator.translate import translation_unit


@pytest.mark.parametrize("probe", probes(), ids=lambda probe: probe.kernel)
def test_every_probe_passes_in_the_emulator(probe: Probe) -> None:
    with emulated() as report:
        result = run_probe(probe, repeats=1)
    assert result.passed, result
    assert report.count() > 0


def test_the_probes_run_every_metal_file(monkeypatch: pytest.MonkeyPatch) -> None:
    text, used = _build.source_text, set()

    def noted(file: Path) -> str:
        used.add(file.name)
        return text(file)

    monkeypatch.setattr(_build, "source_text", noted)
    _build._built.cache_clear()
    with emulated():
        for probe in probes():
            run_probe(probe, repeats=1)
    assert used == {file.name for file in Path(metal_kernels.__file__).parent.rglob("*.metal")}


def test_every_kernel_is_what_apples_compiler_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    made, build = {}, emulator._library

    def noted(source: KernelSource, signature: Signature, checked: bool) -> Path:
        made[signature.function] = translation_unit(source, signature)
        return build(source, signature, checked)

    monkeypatch.setattr(emulator, "_library", noted)
    monkeypatch.setenv("MLX_QWEN_KERNELS", "metal")
    with emulated():
        for probe in probes():
            probe.run()
    assert len(made) > 15
    for unit in made.values():
        check_metal_rules(unit)


def test_a_kernel_that_computes_something_else_does_not_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    text = _build.source_text
    monkeypatch.setattr(_build, "source_text", lambda file: text(file).replace("* inverse * weight", "* weight"))
    _build._built.cache_clear()
    (probe,) = (probe for probe in probes() if probe.kernel == "rms_norm, float32")
    with emulated():
        result = run_probe(probe, repeats=1)
    _build._built.cache_clear()
    assert not result.passed
    assert result.error is not None


def test_a_reference_that_runs_in_a_kernels_place_does_not_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("metal_kernels.norm.kernel.unsupported", lambda *_: "too wide")
    (probe,) = (probe for probe in probes() if probe.kernel == "rms_norm, float32")
    with emulated():
        result = run_probe(probe, repeats=1)
    assert not result.passed
    assert result.failure == "the reference ran: too wide"


def test_a_kernel_that_cannot_be_built_is_a_result_and_not_a_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: object) -> None:
        raise RuntimeError("no such type")

    monkeypatch.setattr("mlx.core.fast.metal_kernel", refuse)
    result = run_probe(probes()[0], repeats=1)
    assert not result.passed
    assert result.failure == "no such type"
