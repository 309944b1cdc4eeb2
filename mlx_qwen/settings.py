"""Everything that a caller can choose about the engine that writes answers, each declared once."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from mlx_qwen.declared import check_values, documented, option
from mlx_qwen.errors import PromptError

Progress: TypeAlias = Callable[[int, int], None]


def _is_depth(depth: str | int | bool) -> bool:
    return depth == "auto" or isinstance(depth, bool) or str(depth) in map(str, range(8))


def _refused_window(size: int) -> bool:
    raise PromptError(
        f"max_kv_size is {size}, but these models keep all that they read: a window of keys and values would lose the "
        "beginning, and three of four layers have a memory of fixed size anyway. Leave it out. To use less memory: "
        "kv_bits=8 or 4, a shorter prompt, or a lower max_tokens; `mlx-qwen plan` says what fits."
    )


@documented
@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """How the engine works, whatever is asked of it: keywords of `generate` that are no request's own.

    Raises PromptError for values that cannot be used.

    Attributes:
        {options}
    """

    kv_bits: int | None = option(
        None, help="8 or 4 packs keys and values of the attention layers.", choices=(4, 8), flag="--kv-bits"
    )
    max_kv_size: int | None = option(
        None,
        help="known from other runtimes, and refused: these models keep all that they read. To use less memory: "
        "kv_bits, a shorter prompt, or a lower max_tokens.",
        check=_refused_window,
        flag="--max-kv-size",
    )
    prefill_step_size: int = option(
        2048,
        help="prompt tokens that are read at once; fewer where memory asks for it.",
        least=1,
        flag="--prefill-step-size",
    )
    mtp: str | int | bool = option(
        "auto",
        help="how many tokens the MTP layer guesses ahead for each pass: as many as pay (auto), or 0 to 7. It never "
        "changes an answer.",
        expected="'auto', False, or a number from 0 to 7",
        check=_is_depth,
        flag="--mtp",
        metavar="auto|0-7",
    )
    draft_model: object = option(
        None,
        help="a smaller model of the same vocabulary, which guesses tokens ahead in place of the MTP layer: a path, a "
        "repository, or what load gives. It reads text only, and never changes an answer.",
        expected="a path or repository of a smaller model, or one from load",
        check=lambda model: isinstance(model, str | Path) or hasattr(model, "make_cache"),
        flag="--draft-model",
        metavar="PATH|REPO",
    )
    prompt_lookup: bool = option(
        False,
        help="guess tokens ahead by copying from the text so far, wherever its last words stood there before, as long "
        "as that pays. It never changes an answer.",
        flag="--prompt-lookup",
    )
    num_draft_tokens: int | None = option(
        None,
        help="how many tokens to guess ahead for each pass, whoever guesses; without it, as many as pay.",
        least=1,
        most=7,
        flag="--num-draft-tokens",
    )
    draft_vocabulary: int | None = option(
        None,
        help="of how many of the vocabulary's first tokens, beside its special ones, guesses are chosen: as many as "
        "pay for the text, unless told otherwise; 0 for all. It never changes an answer.",
        least=0,
        flag="--draft-vocabulary",
    )
    prefix_cache: bool = option(
        True,
        help="whether to go on from what was read before, and to keep what is read now.",
        flag="--prefix-cache/--no-prefix-cache",
    )
    prefix_cache_bytes: int | None = option(
        None,
        help="bytes of memory that what was read before may take, an eighth of the machine's unless told otherwise; "
        "the least recently used goes first.",
        least=0,
        flag="--prefix-cache-bytes",
    )
    prefix_cache_dir: str | Path | None = option(
        None,
        help="a folder in which what was read before is kept for later runs too; several processes and models may "
        "share it.",
        flag=("--prefix-cache-dir", "--cache-dir"),
        metavar="FOLDER",
    )
    prefix_cache_dir_bytes: int | None = option(
        None,
        help="bytes that this folder may take: 16 GiB, or half of what is free on its disk, unless told otherwise.",
        least=1,
        flag="--prefix-cache-dir-bytes",
    )
    progress: Progress | bool = option(
        False,
        help="called with (done, total) prompt tokens, or True for a line on stderr, in a notebook an output.",
        expected="True, False or a function of (done, total)",
    )

    def __post_init__(self) -> None:
        check_values(self)

    @property
    def drafts(self) -> int | None:
        """How many tokens the MTP layer, or the draft model in its place, guesses ahead; None for as many as pay."""
        chosen = self.mtp is not True and self.mtp != "auto" and self.draft_model is None
        return int(self.mtp) if chosen else self.num_draft_tokens
