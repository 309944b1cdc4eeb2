"""A small byte-level tokenizer with Qwen3.5's special tokens, and a chat template in its format."""

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

END_OF_TEXT, START_OF_TURN, END_OF_TURN = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
TAGS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")

# Written for these tests in the format of Qwen3.5: turns, merged tool responses, XML tool calls, reasoning of the turns
# since the last question (or of all with preserve_thinking), and a think block opened or closed by enable_thinking.
CHAT_TEMPLATE = """
{%- macro text(content) -%}
{%- if content is string -%}{{ content }}
{%- else -%}{%- for part in content -%}{{ part.text }}{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- if tools %}
{{- '<|im_start|>system\\n# Tools\\n' }}
{%- for tool in tools %}
{{- tool | tojson }}
{{- '\\n' }}
{%- endfor %}
{%- if messages[0].role == 'system' %}{{- '\\n' + text(messages[0].content) | trim }}{%- endif %}
{{- '<|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
{{- '<|im_start|>system\\n' + text(messages[0].content) | trim + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(query=-1) %}
{%- for message in messages %}
{%- if message.role == 'user' %}{%- set ns.query = loop.index0 %}{%- endif %}
{%- endfor %}
{%- if ns.query < 0 %}{{- raise_exception('nobody asked') }}{%- endif %}
{%- for message in messages %}
{%- set content = text(message.content) | trim %}
{%- if message.role == 'system' %}
{%- if not loop.first %}{{- raise_exception('late system message') }}{%- endif %}
{%- continue %}
{%- elif message.role == 'user' %}
{{- '<|im_start|>user\\n' + content + '<|im_end|>\\n' }}
{%- elif message.role == 'assistant' %}
{{- '<|im_start|>assistant\\n' }}
{%- if loop.index0 > ns.query or (preserve_thinking is defined and preserve_thinking is true) %}
{{- '<think>\\n' + (message.reasoning_content or '') | trim + '\\n</think>\\n\\n' }}
{%- endif %}
{% generation %}
{{- content }}
{%- for call in message.tool_calls or [] %}
{%- set function = call.function if call.function is defined else call %}
{{- '\\n<tool_call>\\n<function=' + function.name + '>\\n' }}
{%- for key, value in function.arguments | items %}
{{- '<parameter=' + key + '>\\n' }}
{{- value | tojson if value is mapping or (value is sequence and value is not string) else value | string }}
{{- '\\n</parameter>\\n' }}
{%- endfor %}
{{- '</function>\\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>' }}{% endgeneration %}
{{- '\\n' }}
{%- elif message.role == 'tool' %}
{%- if loop.previtem is undefined or loop.previtem.role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
{{- '\\n<tool_response>\\n' + content + '\\n</tool_response>' }}
{%- if loop.last or loop.nextitem.role != 'tool' %}{{- '<|im_end|>\\n' }}{%- endif %}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}
{%- else %}{{- '<think>\\n' }}{%- endif %}
{%- endif %}
"""


def tiny_tokenizer(vocab_size: int = 300) -> Tokenizer:
    """All bytes, a few merges and the special tokens: ids 0 to 2 end a text, start and end a turn."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=vocab_size - len(TAGS),
        special_tokens=[END_OF_TEXT, START_OF_TURN, END_OF_TURN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        ["user and assistant talk: what is the answer, and which tool is the one?"] * 4, trainer
    )
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in TAGS])
    return tokenizer


def add_tokenizer(path: Path, *, template: str | None = CHAT_TEMPLATE, vocab_size: int = 300) -> Path:
    """Writes tokenizer.json, tokenizer_config.json and chat_template.jinja into `path`, and returns it."""
    tiny_tokenizer(vocab_size).save(str(path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END_OF_TURN, "pad_token": END_OF_TEXT}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    if template is not None:
        (path / "chat_template.jinja").write_text(template)
    return path
