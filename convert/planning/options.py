"""Everything a caller can choose about a plan, declared once."""

from dataclasses import dataclass
from typing import TypedDict

from mlx_qwen.declared import check_values, documented, option
from mlx_qwen.errors import PlanningError


@documented
@dataclass(frozen=True, slots=True, kw_only=True)
class PlanOptions:
    """The keywords of `plan`. Raises PlanningError for values that cannot be planned for.

    Attributes:
        {options}
    """

    recipe: str | None = option(
        None,
        help="recipe of the converter such as mixed-4-8; or unpacked. By default the converter's own, balanced.",
        flag="--recipe",
        metavar="NAME",
    )
    bits: int | None = option(
        None, help="instead, bits of all matrices alike: 2, 3, 4, 5, 6 or 8; 16 packs nothing.", flag="--bits"
    )
    context: int | None = option(
        None,
        help="tokens of prompt and answer together. By default 32,768, or the model's limit if that is less.",
        flag="--context",
    )
    memory: int | str | None = option(
        None,
        help="memory of the Mac, as it is sold: 64GB is one with 64 GiB; or in bytes. This machine's when neither it "
        "nor a chip is given.",
        flag="--memory",
        metavar="SIZE",
    )
    chip: str | None = option(
        None,
        help="Apple chip such as 'M4 Max', with a memory. By default this machine's, or all.",
        flag="--chip",
    )
    tflops: float | None = option(
        None,
        above=0,
        expected="more than 0",
        help="fp16 arithmetic rate of the GPU, 10^12 operations a second, where Apple has published none.",
        flag="--tflops",
    )
    kv_bits: int | None = option(None, help="pack keys and values to 8 or 4 bits.", flag="--kv-bits")
    prefill_step_size: int = option(
        2048, least=1, help="tokens of the prompt that are read at once.", flag="--prefill-step-size"
    )
    ranks: int = option(1, least=1, help="Macs that share the model: sizes are those of each.", flag="--ranks")
    latency: float | None = option(
        None,
        above=0,
        expected="more than 0",
        help="milliseconds of a sum of a token over all ranks, as `mlx-qwen doctor --distributed` measures it.",
        flag="--latency",
    )
    link: float = option(
        5.0,
        above=0,
        expected="more than 0",
        help="10^9 bytes a second that a rank sends to the next; measured beside --latency.",
        flag="--link",
    )
    vision: bool = option(False, help="count the vision tower, which text alone does not load.", flag="--vision")
    revision: str | None = option(None, help="branch, tag or commit of the Hub repository.", flag="--revision")

    def __post_init__(self) -> None:
        check_values(self, PlanningError)


class PlanKeywords(TypedDict, total=False):
    """The names and types of `PlanOptions`, for type checkers."""

    recipe: str | None
    bits: int | None
    context: int | None
    memory: int | str | None
    chip: str | None
    tflops: float | None
    kv_bits: int | None
    prefill_step_size: int
    ranks: int
    latency: float | None
    link: float
    vision: bool
    revision: str | None
