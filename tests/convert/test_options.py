"""Every option is declared once: signatures, help, checks and flags follow from that."""

import inspect
import re
from collections.abc import Callable
from typing import get_type_hints

import click
import pytest

from mlx_qwen.cli.compare import command as compare_command
from mlx_qwen.cli.convert import command as convert_command
from mlx_qwen.cli.plan import command as plan_command
from mlx_qwen.convert import compare, convert, describe
from mlx_qwen.convert.comparison.options import ComparisonKeywords, ComparisonOptions
from mlx_qwen.convert.options import ConversionKeywords, ConversionOptions, DescriptionKeywords, DescriptionOptions
from mlx_qwen.convert.planning import plan
from mlx_qwen.convert.planning.options import PlanKeywords, PlanOptions
from mlx_qwen.declared import Declared, declared
from mlx_qwen.errors import ConversionError, PlanningError

Function = Callable[..., object]
DECLARED: list[tuple[Function, type[Declared], type]] = [
    (convert, ConversionOptions, ConversionKeywords),
    (describe, DescriptionOptions, DescriptionKeywords),
    (plan, PlanOptions, PlanKeywords),
    (compare, ComparisonOptions, ComparisonKeywords),
]


@pytest.mark.parametrize(("function", "options", "keywords"), DECLARED)
def test_type_checkers_are_told_the_names_and_types_that_are_declared(
    function: Function, options: type[Declared], keywords: type
) -> None:
    assert get_type_hints(options) == get_type_hints(keywords)


@pytest.mark.parametrize(("function", "options", "keywords"), DECLARED)
def test_the_signature_and_the_help_show_every_option(
    function: Function, options: type[Declared], keywords: type
) -> None:
    shown = inspect.signature(function).parameters
    assert all(parameter.kind is not inspect.Parameter.VAR_KEYWORD for parameter in shown.values())
    text = " ".join((inspect.getdoc(function) or "").split())
    for field, declaration in declared(options):
        assert shown[field.name].default == field.default
        assert " ".join(f"{field.name}: {declaration.help}".split()) in text


@pytest.mark.parametrize(
    ("command", "options"),
    [(convert_command, ConversionOptions), (plan_command, PlanOptions), (compare_command, ComparisonOptions)],
)
def test_every_flag_is_that_of_an_option_under_its_name(command: click.Command, options: type[Declared]) -> None:
    flags = {name: parameter for parameter in command.params if (name := parameter.name) is not None}
    with_flag = {field.name for field, declaration in declared(options) if declaration.flags}
    own = {"hf_path", "mlx_path", "fit", "context", "verbose", "model", "reference", "other", "json_file", "plot"}
    assert with_flag <= set(flags) <= with_flag | own


@pytest.mark.parametrize(
    ("function", "keywords", "said"),
    [
        (convert, {"bit": 4}, "no option 'bit'; did you mean bits"),
        (convert, {"q_group_size": 64}, "did you mean group_size"),
        (convert, {"over_write": True}, "did you mean overwrite"),
        (describe, {"recipes": "4bit"}, "did you mean recipe"),
        (describe, {"overwrite": True}, "no option 'overwrite'"),
        (compare, {"windows": 64}, "did you mean window"),
        (convert, {"bits": "4"}, "bits is '4'; expected a whole number"),
        (convert, {"bits": True}, "bits is True; expected a whole number"),
        (convert, {"overwrite": "yes"}, "overwrite is 'yes'; expected True or False"),
        (convert, {"quantize": None}, "quantize is None; expected True or False"),
        (convert, {"bits_for": ["mlp=8"]}, "bits_for is "),
        (convert, {"bits_for": {"mlp": 8.5}}, "bits_for is "),
        (convert, {"dtype": "fp16"}, "dtype is 'fp16', expected one of bfloat16, "),
        (convert, {"announce": "loudly"}, "announce is 'loudly'; expected a function"),
        (convert, {"dtype": 16}, "dtype is 16; expected 'bfloat16' or"),
        (compare, {"tokens": 4.5}, "tokens is 4.5; expected a whole number"),
        (compare, {"window": 1}, "window is 1, expected at least 2"),
    ],
)
def test_what_is_no_option_or_of_the_wrong_type_is_one_clear_error(
    function: Function, keywords: dict[str, object], said: str
) -> None:
    paths = ["nowhere"] if function is describe else ["nowhere", "out"]
    with pytest.raises(ConversionError, match=re.escape(said)):
        function(*paths, **keywords)


@pytest.mark.parametrize("given", [(None, "out"), ("nowhere", 5), (b"nowhere", "out")])
def test_a_path_that_is_none_is_one_clear_error(given: tuple[object, object]) -> None:
    for function in (convert, compare):
        with pytest.raises(ConversionError, match="expected a text or a path"):
            function(*given)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("keywords", "said"),
    [({"bitts": 4}, "did you mean bits"), ({"context": "8k"}, "context is '8k'"), ({"tflops": 0}, "tflops is 0")],
)
def test_a_plan_says_so_too(keywords: dict[str, object], said: str) -> None:
    with pytest.raises(PlanningError, match=re.escape(said)):
        plan("4B", **keywords)  # type: ignore[arg-type]


def test_the_package_lists_what_is_meant_for_users_and_no_imported_helper() -> None:
    import mlx_qwen.convert as package

    assert [name for name in dir(package) if not name.startswith("__")] == sorted(package.__all__)
