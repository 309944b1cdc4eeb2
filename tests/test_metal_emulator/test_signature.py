"""The generated text is MLX's own."""

from pathlib import Path

import mlx.core as mx
import pytest

from tests.metal_emulator.signature import METAL_TYPES, THREAD_ATTRIBUTES, KernelSource, TemplateValue, make_signature

DTYPES = list(METAL_TYPES)
CASES: dict[str, tuple[str, list[mx.array], list[mx.Dtype], list[tuple[str, TemplateValue]], bool]] = {
    "every dtype, small and large": (
        "uint i = 0;",
        [mx.zeros((2, 5), dtype) for dtype in DTYPES[:6]] + [mx.zeros((7,), dtype) for dtype in DTYPES[6:]],
        DTYPES,
        [],
        False,
    ),
    "every thread attribute": (" ".join(THREAD_ATTRIBUTES), [mx.zeros((8,))], [mx.float32], [], False),
    "one attribute inside a longer word": ("int my_thread_position_in_grid_x;", [], [mx.int32], [], False),
    "shapes, strides and ranks that the body names": (
        "a_ndim a_strides[0] b_shape a_shape c_shape d_strides c_ndim",
        [mx.zeros((8,)), mx.zeros((2, 2)), mx.array(1.0), mx.zeros((0, 4))],
        [mx.float16],
        [],
        False,
    ),
    "template arguments of every kind": (
        "out[0] = T(N);",
        [mx.zeros((9,), mx.bfloat16)],
        [mx.bfloat16],
        [("T", mx.bfloat16), ("N", -3), ("on", True), ("off", False), ("M", 7), ("C", mx.complex64)],
        False,
    ),
    "atomic outputs": ("", [mx.array(2)], [mx.uint32, mx.float32], [("N", 1)], True),
}


@pytest.mark.parametrize("case", CASES)
def test_the_text_is_what_mlx_generates(case: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source, inputs, dtypes, template, atomic = CASES[case]
    names = tuple("abcdefghijklmn"[: len(inputs)])
    results = tuple(f"out{i}" for i in range(len(dtypes)))
    header = "// a header\n"
    made = mx.fast.metal_kernel(
        name="tried",
        input_names=names,
        output_names=results,
        source=source,
        header=header,
        atomic_outputs=atomic,
    )

    assert callable(made)

    def call(*arrays: mx.array) -> tuple[mx.array, ...]:
        options = {"template": template} if template else {}
        outputs: list[mx.array] = made(
            inputs=list(arrays),
            grid=(32, 1, 1),
            threadgroup=(32, 1, 1),
            output_shapes=[(8,)] * len(dtypes),
            output_dtypes=dtypes,
            verbose=True,
            **options,
        )
        return tuple(outputs)

    mx.export_function(str(tmp_path / "traced.mlxfn"), call, *inputs)
    printed = capfd.readouterr().out
    theirs = printed.split("```\n")[1].rstrip("\n")

    ours = make_signature(KernelSource("tried", names, results, source, header, True, atomic), inputs, dtypes, template)
    assert ours.text(header).rstrip("\n") == theirs


def test_a_missing_input_is_named() -> None:
    kernel = KernelSource("tried", ("a", "b"), ("out",), "", "", True, False)
    with pytest.raises(ValueError, match=r"2 inputs \(a, b\), got 1"):
        make_signature(kernel, [mx.zeros((8,))], [mx.float32], [])
