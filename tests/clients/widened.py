"""The bundled checkpoint, made fit for the prompts of coding agents.

These have up to 18,000 of Qwen's tokens, which is more than the bundled context, and more than twice as many of the
bundled tokenizer's 640. So a copy gets a larger context and 8,000 tokens more, trained on this repository's own text; a
new token's embedding is that of an old one. All other weights are the bundled ones, in fp32, which CPUs multiply
fastest.
"""

import json
import shutil
from pathlib import Path

import mlx.core as mx
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from mlx_qwen.demo import demo_folder

CONTEXT = 65_536
_NEW_TOKENS = 8_000
_EMBEDDING = "language_model.model.embed_tokens.weight"
_ROOT = Path(__file__).resolve().parents[2]


def widened_checkpoint(folder: Path) -> Path:
    """Writes the copy into `folder`, which must not be there yet."""
    shutil.copytree(demo_folder(), folder)
    old = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer = _widened(old)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    size = 1 + max(tokenizer["model"]["vocab"].values())
    for file in folder.glob("*.safetensors"):
        arrays = {name: array.astype(mx.float32) for name, array in mx.load(str(file)).items()}
        if _EMBEDDING in arrays:
            rows = mx.arange(size) % old.get_vocab_size(with_added_tokens=False)
            rows[: old.get_vocab_size()] = mx.arange(old.get_vocab_size())
            arrays[_EMBEDDING] = arrays[_EMBEDDING][rows]
        mx.eval(arrays)
        mx.save_safetensors(str(file), arrays, {"format": "mlx"})
    config = json.loads((folder / "config.json").read_text())
    config["dtype"] = config["text_config"]["dtype"] = "float32"
    config["text_config"] |= {"vocab_size": size, "max_position_embeddings": CONTEXT}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _widened(old: Tokenizer) -> dict:
    """tokenizer.json with merges of its own; tokens that were there keep their ids."""
    trained = Tokenizer(BPE())
    trained.pre_tokenizer = old.pre_tokenizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    texts = sorted(str(path) for name in ("docs", "mlx_qwen", "tests") for path in (_ROOT / name).rglob("*.[mp][dy]"))
    trained.train(texts, BpeTrainer(vocab_size=_NEW_TOKENS, initial_alphabet=alphabet, show_progress=False))
    whole, model = json.loads(old.to_str()), json.loads(trained.to_str())["model"]
    vocab, taken = old.get_vocab(), old.get_vocab_size()
    new = [token for token in model["vocab"] if token not in vocab]
    whole["model"]["vocab"] = vocab | {token: taken + index for index, token in enumerate(new)}
    whole["model"]["merges"] = model["merges"]
    return whole
