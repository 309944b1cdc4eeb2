"""Placeholders of images and videos in a prompt's token ids: one for each, that becomes one for each feature."""

from collections.abc import Callable, Sequence

from mlx_qwen.errors import PromptError
from mlx_qwen.media.grids import Kind

_FORMS = {
    Kind.IMAGE: "<|vision_start|><|image_pad|><|vision_end|>",
    Kind.VIDEO: "<|vision_start|><|video_pad|><|vision_end|>",
}


def expand(
    ids: Sequence[int],
    kind: Kind,
    token: int,
    sizes: Sequence[int],
    fill: Callable[[int], list[int]],
    *,
    rendered: bool,
    around: tuple[int | None, int | None] = (None, None),
) -> list[int]:
    """Token ids in which the i-th placeholder `token` is replaced by `fill(i)`, and the ids `around` it with it.

    `sizes` are the features of each image or video: ids that hold as many placeholders already stay as they are, unless
    a chat template `rendered` them, which sets one for each. Raises PromptError unless there is one for each.
    """
    found = list(ids).count(token)
    if found == len(sizes):
        return _filled(ids, token, fill, around)
    if found == sum(sizes) and not rendered:
        return list(ids)
    name = kind.name.lower()
    raise PromptError(
        f"The prompt has {found:,} {name} placeholders and {len(sizes)} {name}s were given, expected one for each. "
        f"Put {_FORMS[kind]} where {'an image' if kind is Kind.IMAGE else 'a video'} belongs, or pass chat messages; "
        "text must not hold these tokens otherwise."
    )


def _filled(
    ids: Sequence[int], token: int, fill: Callable[[int], list[int]], around: tuple[int | None, int | None]
) -> list[int]:
    filled: list[int] = []
    index, before, after = 0, *around
    skipped = False
    for at, known in enumerate(ids):
        if skipped:
            skipped = False
        elif known != token:
            filled.append(known)
        else:
            if before is not None and filled and filled[-1] == before and ids[at + 1 : at + 2] == [after]:
                filled.pop()
                skipped = True
            filled += fill(index)
            index += 1
    return filled


def starts(ids: Sequence[int], token: int, sizes: Sequence[int]) -> list[int]:
    """Where the first placeholder of each image or video stands in expanded ids."""
    places = [index for index, known in enumerate(ids) if known == token]
    return [places[sum(sizes[:i])] for i in range(len(sizes))]


def timestamped(seconds: float) -> str:
    """The text of a temporal patch of a video, with one placeholder.

    Patches stand in the place of the template's placeholder and of the marks around it, as in the family's own
    processor, which the models were trained with; transformers since 5.10 leaves that outer pair around all patches.
    """
    return f"<{seconds:.1f} seconds>{_FORMS[Kind.VIDEO]}"
