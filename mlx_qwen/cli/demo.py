"""`mlx-qwen demo`: the main job from end to end on a checkpoint made on the spot, without network."""

import json
import tempfile
from pathlib import Path

import click

_TEMPLATE = """\
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_TOY = {
    "hidden_size": 256,
    "num_attention_heads": 4,
    "head_dim": 64,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 128,
    "shared_expert_intermediate_size": 128,
    "vocab_size": 256 + len(_SPECIAL),
    "eos_token_id": 258,
}
_PROMPT = "What is the gated delta rule?"


@click.command()
@click.option("--keep", type=click.Path(path_type=Path, file_okay=False), help="Keep both checkpoints in this folder.")
def command(keep: Path | None) -> None:
    """Make a small random checkpoint, convert it to 4 bits, and stream tokens from it.

    The architecture is that of the Qwen3.5 MoE models at toy size. Its weights are random, so its text is noise: it
    shows that every step works on this machine, not what a trained model would say.
    """
    if keep is not None:
        _run(keep)
        return
    with tempfile.TemporaryDirectory() as folder:
        _run(Path(folder))


def _run(folder: Path) -> None:
    from mlx_qwen.cli.answering import answer_prompt
    from mlx_qwen.convert import convert
    from mlx_qwen.convert.synthetic import write_random_checkpoint
    from mlx_qwen.generation.options import GenerationOptions
    from mlx_qwen.loading import load
    from mlx_qwen.sizes import reduced

    source, target = folder / "demo-bf16", folder / "demo-4bit"
    config = reduced("35B-A3B", num_layers=8, changes=_TOY)
    click.secho(f"1. A toy Qwen3.5 MoE in Hugging Face layout, random weights: {source}", bold=True)
    write_random_checkpoint(config, source)
    _write_tokenizer(source)

    click.secho("2. Converted to 4 bits", bold=True)
    click.echo(convert(source, target, overwrite=True).table())

    click.secho(f"3. Its answer to {_PROMPT!r}, which is noise, as its weights are random", bold=True)
    model, processor = load(target)
    options = GenerationOptions(max_tokens=48, temperature=1.0, seed=0)
    answer_prompt(model, processor, [{"role": "user", "content": _PROMPT}], options, verbose=True)
    click.echo("\nWith a real model:\n  mlx-qwen convert --hf-path Qwen/Qwen3.5-0.8B --mlx-path qwen3.5-0.8b-4bit")
    click.echo('  mlx-qwen generate --model qwen3.5-0.8b-4bit --prompt "Why is the sky blue?"')


def _write_tokenizer(folder: Path) -> None:
    """Bytes as tokens, the special tokens of a chat, and a chat template."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE

    alphabet = {byte: i for i, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(_SPECIAL))
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}), encoding="utf-8")
    (folder / "chat_template.jinja").write_text(_TEMPLATE, encoding="utf-8")
