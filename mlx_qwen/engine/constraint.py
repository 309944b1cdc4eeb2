"""What an answer is held to, by its options: a schema, a regex, a grammar, calls of tools, or no calls."""

import json
from collections.abc import Mapping
from dataclasses import dataclass

from mlx_qwen.answer.schemas import mapping
from mlx_qwen.answer.typed_schemas import schema_of
from mlx_qwen.engine.call_grammar import CLOSER, OPENER, call_rule, is_strict
from mlx_qwen.engine.call_values import Lark, json_schema, refused
from mlx_qwen.engine.grammar import Grammar, Without, begin_tables, check_installed, matcher_of
from mlx_qwen.errors import PromptError
from mlx_qwen.json_types import Tools
from mlx_qwen.options import GenerationOptions
from mlx_qwen.prompt.processor import Processor


@dataclass(frozen=True, slots=True)
class Constraint:
    """How an answer is held to what its options ask for.

    Attributes:
        rule: what keeps it so while it is written; None where nothing need be kept.
        most_calls: how many calls it may hold; None for any number.
        whole: whether the rule covers all of the answer, so that one must follow the reasoning.
    """

    rule: Grammar | Without | None = None
    most_calls: int | None = None
    whole: bool = False


def constraint_of(options: GenerationOptions, processor: Processor, vocab_size: int, *, inside: bool) -> Constraint:
    """The constraint of one answer; `inside`: whether the prompt already opened the think block.

    Raises PromptError, before anything is computed, for what cannot be enforced.
    """
    choice, tools = options.called_tools
    most = None if options.parallel_tool_calls else 1
    opener = processor.tokenizer.token_to_id(OPENER)
    content = _content(options)
    if content is None and choice == "none":
        banned = [] if opener is None else [opener]
        return Constraint(Without(banned, vocab_size) if banned else None, most_calls=0)
    strict = any(map(is_strict, tools)) and opener is not None
    if content is None and choice == "auto" and not strict:
        return Constraint(most_calls=most)
    begin_tables(processor, vocab_size)  # while the grammar is written

    def held(grammar: str, what: str, *, trigger: int | None = None) -> Grammar:
        thinks = [opener] if opener is not None else []
        return Grammar(
            matcher_of(grammar, processor, vocab_size, what=what),
            spell=begin_tables(processor, vocab_size).result().tokenize_bytes,
            vocab_size=vocab_size,
            end_token_ids=processor.end_token_ids,
            thinking=processor.thinking,
            inside=inside,
            opening=processor.encode("\n\n"),
            trigger=trigger,
            avoided=[*sorted(processor.end_token_ids), *thinks],
        )

    if content is None and choice == "auto":
        return Constraint(held(_calls(tools, processor, most=1), "The tools", trigger=opener), most)
    if content is None or (tools and choice != "auto"):
        return Constraint(held(_calls(tools, processor, most=most), "tool_choice"), most, whole=True)
    if tools:
        calls = {"name": "calls", "lark_grammar": _calls(tools, processor, most=most)}
        either = [{"lark_grammar": "start: @calls | @content"}, calls, {"name": "content", **content.grammar}]
        return Constraint(held(json.dumps({"grammars": either}), content.what), most, whole=True)
    return Constraint(held(json.dumps({"grammars": [content.grammar]}), content.what), 0, whole=True)


@dataclass(frozen=True, slots=True)
class _Content:
    """A grammar for llguidance, as an entry of its list, and the option that asked for it."""

    grammar: Mapping[str, object]
    what: str


def _content(options: GenerationOptions) -> _Content | None:
    """What the words of the answer are held to."""
    if options.regex is not None:
        return _Content({"lark_grammar": f"start: REGEX\nREGEX: {_between_slashes(options.regex)}"}, "regex")
    if options.grammar is not None:
        return _Content({"lark_grammar": options.grammar}, "grammar")
    schema, lenient, what = options.schema, False, "schema"
    if schema is None and options.response_format is not None:
        schema, lenient = _of_response_format(options.response_format)
        what = "response_format"
    if schema is None:
        return None
    described = schema if isinstance(schema, Mapping) else schema_of(schema)
    why = _refused(described)
    if why and not lenient:
        raise PromptError(f"{what} cannot be enforced: {why}. Leave that out, and check the answer for it.")
    return _Content({"json_schema": json_schema(described, lenient=lenient)}, what)


def _of_response_format(wanted: Mapping[str, object]) -> tuple[Mapping[str, object] | None, bool]:
    """The schema that OpenAI's `response_format` asks for, and whether what cannot be enforced may be left out."""
    if wanted.get("type") == "json_object":
        return {"type": "object"}, False
    if wanted.get("type") != "json_schema":
        return None, False
    described = mapping(wanted.get("json_schema", wanted))
    return mapping(described.get("schema")), described.get("strict") is not True


def _refused(schema: Mapping[str, object]) -> str:
    check_installed()
    return refused(json_schema(schema, lenient=False))


def _between_slashes(regex: str) -> str:
    check_installed()
    from llguidance import regex_to_lark

    return f"/{regex_to_lark(regex, '')}/"


def _calls(tools: Tools, processor: Processor, *, most: int | None) -> str:
    """The grammar of one call after the other, at most `most`."""
    lark = Lark([tag for tag in (OPENER, CLOSER) if processor.tokenizer.token_to_id(tag) is not None])
    template = processor.chat_template or ""
    check_installed()
    call = call_rule(lark, tools, as_json="<function=" not in template and OPENER in template)
    return lark.starting_with(call if most == 1 else f'{call} ("\\n" {call})*')
