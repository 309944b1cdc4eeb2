"""Everything a caller can choose about a conversion, declared once, and the settings that follow from it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict, get_args

from mlx_qwen.checkpoint.layout import Mode
from mlx_qwen.declared import check_values, documented, option
from mlx_qwen.errors import ConversionError
from mlx_qwen.sizes import bytes_of

from .description import Description
from .recipes.precisions import precision
from .recipes.recipe import BALANCED_BITS, DEFAULT_RECIPE, RECIPES, Recipe, named, uniform
from .recipes.rules import written_rules
from .settings import AUTO, DEFAULT_TEXT, AskedDType, DType, Quantizer, Settings

_FOR_QUANTIZING = ("bits", "group_size", "mode", "recipe", "bits_for", "target_size", "quantizer", "calibration")


@documented
@dataclass(frozen=True, slots=True, kw_only=True)
class DescriptionOptions:
    """What decides about the tensors that a conversion writes, and where it reads: the keywords of `describe`.

    Raises ConversionError for values of the wrong type.

    Attributes:
        {options}
    """

    recipe: str | None = option(
        None,
        help=f"which matrix gets which precision, by name: {', '.join((DEFAULT_RECIPE, *RECIPES))}. By default "
        f"{DEFAULT_RECIPE}: {BALANCED_BITS} bits a weight of all but vision and MTP, spread by each matrix's measured "
        "error.",
        flag="--recipe",
        metavar="NAME",
    )
    bits_for: Mapping[str, int | str] | None = option(
        None,
        help="precision of single matrices before all else: from a regular expression, searched for in their MLX "
        "names, to bits as 8, bits and group size as '8,32', a mode as 'mxfp8', or 'none' to leave them unpacked. The "
        "last pattern that matches counts. The vision tower is packed by patterns that name it only: 'vision' to 8.",
        flag="--bits-for",
        metavar="PATTERN=BITS",
    )
    target_size: int | str | None = option(
        None,
        help="instead of a recipe, the most that the weight files may take, in bytes or as 16GB (10^9 each; 16GiB are "
        "2^30): bits are chosen for each matrix by its measured error, and with a calibration text by that of its "
        "outputs.",
        flag="--target-size",
        metavar="SIZE",
    )
    bits: int | None = option(
        None,
        help="bits a weight of most matrices alike: 2, 3, 4, 5, 6 or 8; with a mode alone the mode's own.",
        flag="--q-bits",
    )
    group_size: int | None = option(
        None,
        help="weights that share a scale: 32, 64 or 128. By default 64, or the mode's own.",
        flag="--q-group-size",
    )
    mode: Mode | None = option(
        None,
        help="how numbers are packed: affine, the default, or mxfp4, nvfp4 or mxfp8, whose bits and groups are fixed.",
        flag="--q-mode",
    )
    dtype: AskedDType | None = option(
        None,
        help="type of unpacked weights, scales and biases, by default the source's; A_log stays in float32. auto is "
        "float16 for M1 and M2, if the weights fit, and bfloat16 otherwise.",
        flag="--dtype",
    )
    chip: str | None = option(
        None,
        help="Apple chip that the dtype auto is for, such as 'M2 Pro'; by default this machine's.",
        flag="--chip",
    )
    quantizer: Quantizer | None = option(
        None,
        help="how codes are found: the nearest, as mlx-lm does (rtn); by the least error of the weights, up to 6 bits, "
        "above which that gains next to nothing (search); or by the least error of the matrices' outputs on a "
        "calibration text, which takes the time of some runs of the model (gptq). By default search, with a "
        "calibration text gptq.",
        flag="--quantizer",
    )
    calibration: str | Path | None = option(
        None,
        help="text for the quantizer gptq: a file, plain or .jsonl with a 'text' or 'messages' a line, or default for "
        "the one that comes with mlx-qwen.",
        flag="--calibration",
        metavar="FILE|default|none",
    )
    quantize: bool = option(
        True,
        help="pack most matrices. Without, all are written unpacked, also those of a quantized source.",
        flag=("--quantize/--no-quantize", "-q"),
    )
    dequantize: bool = option(
        False,
        help="unpack a quantized source, exactly, and insist that it is one.",
        flag=("--dequantize", "-d"),
    )
    adapter_path: str | Path | None = option(
        None,
        help="adapter of a fine-tuning to merge into the source while it is converted, in fp32: a folder or Hub "
        "repository as PEFT (LoRA, rsLoRA, DoRA) or mlx-lm write it. Tokenizer and template stay the source's.",
        flag="--adapter-path",
        metavar="FOLDER|REPO",
    )
    revision: str | None = option(None, help="branch, tag or commit of the Hub repository.", flag="--revision")
    progress: bool | None = option(None, help="show a line of progress. By default on a terminal and in a notebook.")

    def __post_init__(self) -> None:
        _check(self)


@documented
@dataclass(frozen=True, slots=True, kw_only=True)
class ConversionOptions(DescriptionOptions):
    """The keywords of `convert`. Raises ConversionError for values of the wrong type.

    Attributes:
        {options}
    """

    overwrite: bool = option(
        False, help="replace an existing model folder, once the new one is complete.", flag="--overwrite"
    )
    resume: bool = option(
        True,
        help="go on with an unfinished conversion to the folder. Without, start afresh and remove what it left.",
        flag="--resume/--no-resume",
    )
    stream_from_hub: bool = option(
        False,
        help="download, convert and remove the repository's shards one after the other, so that the disk needs room "
        "for the output and two shards.",
        flag="--stream-from-hub",
    )
    verify: bool = option(
        False,
        help="compare the output with the source before it gets its name, as `compare` does; the report and the model "
        "card say what that shows. Takes the time of a run of both models.",
        flag="--verify",
    )
    verify_text: str | Path | None = option(
        None,
        help="file of UTF-8 text to verify on, of which 4,096 tokens are read. By default a short one of several "
        "languages and kinds that comes with mlx-qwen.",
        flag="--verify-text",
        metavar="FILE",
    )
    upload: str | None = option(
        None,
        help="Hub repository to upload the output to, made if need be; whether that is allowed is asked first.",
        flag="--upload",
        metavar="REPO",
    )
    dry_run: bool = option(
        False,
        help="check everything and show tensors and sizes, without writing. Of a Hub repository, only the headers of "
        "the weights are read.",
        flag="--dry-run",
    )
    announce: Callable[[Description], None] | None = option(
        None, help="called with what will be written once it is decided, before the work starts."
    )

    def __post_init__(self) -> None:
        _check(self)
        if self.verify_text is not None and not self.verify:
            raise ConversionError("verify_text only matters with verify. Leave it out, or verify.")


def _check(options: DescriptionOptions) -> None:
    choices = {"dtype": (*get_args(DType), AUTO), "mode": get_args(Mode), "quantizer": get_args(Quantizer)}
    for name, allowed in choices.items():
        value = getattr(options, name)
        if isinstance(value, str) and value not in allowed:
            raise ConversionError(f"{name} is {value!r}, expected one of {', '.join(allowed)}.")
    check_values(options, ConversionError)


class DescriptionKeywords(TypedDict, total=False):
    """The names and types of `DescriptionOptions`, for type checkers."""

    recipe: str | None
    bits_for: Mapping[str, int | str] | None
    target_size: int | str | None
    bits: int | None
    group_size: int | None
    mode: Mode | None
    dtype: AskedDType | None
    chip: str | None
    quantizer: Quantizer | None
    calibration: str | Path | None
    quantize: bool
    dequantize: bool
    adapter_path: str | Path | None
    revision: str | None
    progress: bool | None


class ConversionKeywords(DescriptionKeywords, total=False):
    """The names and types of `ConversionOptions`, for type checkers."""

    overwrite: bool
    resume: bool
    stream_from_hub: bool
    verify: bool
    verify_text: str | Path | None
    upload: str | None
    dry_run: bool
    announce: Callable[[Description], None] | None


def check_settings(options: DescriptionOptions | None = None) -> Settings:
    """Make one recipe of what is asked; raises ConversionError for contradictions and for what MLX cannot store."""
    options = options or DescriptionOptions()
    if options.chip is not None and options.dtype != AUTO:
        raise ConversionError('chip only matters for the dtype "auto". Leave it out, or ask for that dtype.')
    given = [name for name in _FOR_QUANTIZING if getattr(options, name) is not None and getattr(options, name) != {}]
    if options.dequantize or not options.quantize:
        if given:
            matter, them = ("matters", "it") if len(given) == 1 else ("matter", "them")
            raise ConversionError(
                f"{' and '.join(given)} only {matter} when quantizing, which is turned off. Leave {them} out, or "
                "quantize."
            )
        return Settings(None, options.dtype, options.dequantize, chip=options.chip, adapter_path=options.adapter_path)
    _check_apart(given)
    size = options.target_size
    named_or_fitted = options.recipe is not None or size is not None
    exact = (
        options.bits is not None or options.mode is not None or (options.group_size is not None and not named_or_fitted)
    )
    balanced = not exact and size is None and options.recipe in (None, DEFAULT_RECIPE)
    rules = written_rules(options.bits_for or {}, options.group_size)
    return Settings(
        recipe=_recipe(options, exact).with_rules(rules),
        dtype=options.dtype,
        dequantize=False,
        asked=exact or named_or_fitted,
        exact=exact,
        target_size=None if size is None else bytes_of(size, "target_size", ConversionError),
        target_bits=BALANCED_BITS if balanced else None,
        chip=options.chip,
        quantizer=_quantizer(options.quantizer, options.calibration),
        calibration=_calibration(options.quantizer, options.calibration),
        adapter_path=options.adapter_path,
    )


def _quantizer(asked: Quantizer | None, calibration: str | Path | None) -> Quantizer:
    """The quantizer asked for, else the one that `calibration` calls for."""
    calibrated = calibration is not None and calibration != "none"
    if asked == "gptq" and calibration == "none":
        raise ConversionError(
            f'The quantizer "gptq" needs a calibration text. Give one, or "{DEFAULT_TEXT}", or choose "search".'
        )
    if asked in ("rtn", "search") and calibrated:
        raise ConversionError(f'The quantizer "{asked}" reads no calibration text. Leave it out, or choose "gptq".')
    return asked or ("gptq" if calibrated else "search")


def _calibration(quantizer: Quantizer | None, asked: str | Path | None) -> str | Path | None:
    """The calibration text, where one is asked for or implied."""
    if asked is None:
        return DEFAULT_TEXT if quantizer == "gptq" else None
    return None if asked == "none" else asked


def _check_apart(given: list[str]) -> None:
    """Bits and mode, a recipe and a size each say which matrix gets how many bits; only one of them can."""
    ways = [name for name in given if name in ("bits", "mode", "recipe", "target_size")]
    if len(ways) > 1 and ways != ["bits", "mode"]:
        raise ConversionError(
            f"{' and '.join(ways)} contradict each other: each decides about every matrix. Choose one of them, and say "
            "with bits_for which matrices differ."
        )


def _recipe(options: DescriptionOptions, exact: bool) -> Recipe:
    if exact:
        return uniform(precision(options.bits, options.group_size, options.mode))
    if options.target_size is not None:
        return uniform(precision(None, options.group_size), "fitted")
    if options.recipe in (None, DEFAULT_RECIPE):
        return uniform(precision(None, options.group_size), DEFAULT_RECIPE)
    return named(options.recipe, options.group_size)
