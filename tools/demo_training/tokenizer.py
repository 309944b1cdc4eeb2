"""The demo's tokenizer: byte-level pairs learnt from the tasks' own text, single digits, Qwen's special tokens."""

import json
import random
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from mlx_qwen.demo.tasks import TASKS
from tools.demo_training.rendering import render

HERE = Path(__file__).parent
TOKENIZER_FILE = HERE / "tokenizer.json"

VOCABULARY = 640
END_OF_TEXT, END_OF_TURN = "<|endoftext|>", "<|im_end|>"
SPECIAL = (
    END_OF_TEXT,
    "<|im_start|>",
    END_OF_TURN,
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
TAGS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")
# Words with the space or sign before them, digits one by one, runs of signs, line breaks, spaces.
_PIECES = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_EXAMPLES_A_TASK = 1500
# A dozen fixed sentences are no measure of what is frequent.
_UNSEEN = ("talk", "introduced")


def train_tokenizer(examples: int = _EXAMPLES_A_TASK) -> Tokenizer:
    """A tokenizer of the pairs that are most frequent in `examples` texts of every task: the same every time."""
    tokenizer = _empty()
    trainer = BpeTrainer(
        vocab_size=VOCABULARY - len(SPECIAL) - len(TAGS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(examples), trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in TAGS])
    return tokenizer


@lru_cache(maxsize=1)
def demo_tokenizer() -> Tokenizer:
    """The tokenizer of the checkpoint, in the file beside this one."""
    return Tokenizer.from_file(str(TOKENIZER_FILE))


def token_id(token: str) -> int:
    """The id of one of the tokenizer's own tokens."""
    found = demo_tokenizer().token_to_id(token)
    if found is None:
        raise KeyError(f"{TOKENIZER_FILE.name} has no token {token!r}")
    return int(found)


def _empty() -> Tokenizer:
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _texts(examples: int) -> Iterator[str]:
    """Text of every task between the special tokens; of tools less, as their descriptions repeat the same words."""
    special = re.compile("|".join(map(re.escape, (*SPECIAL, *TAGS))))
    for name, task in TASKS.items():
        if name in _UNSEEN:
            continue
        rng = random.Random(name)
        for _ in range(examples // (4 if name.startswith("tool") else 1)):
            yield from special.split(render(task(rng)))


def main() -> None:
    """Train a tokenizer and write it beside this file: a checkpoint that knows the one before must be trained anew."""
    tokenizer = train_tokenizer()
    content = json.loads(tokenizer.to_str())
    TOKENIZER_FILE.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
