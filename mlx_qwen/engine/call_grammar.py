"""Tool calls as a grammar: in the model's own markup, with arguments that the tools' schemas accept."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence

from mlx_qwen.answer.schemas import Schema, items, mapping, target
from mlx_qwen.engine.call_values import Lark, Values, json_schema, quoted, refused, rooted
from mlx_qwen.errors import PromptError
from mlx_qwen.json_types import Tools, tool_name

OPENER, CLOSER = "<tool_call>", "</tool_call>"
_UNENFORCED = (
    *("patternProperties", "propertyNames", "minProperties", "maxProperties", "dependentRequired"),
    *("dependentSchemas", "not", "if"),
)


def function_of(tool: Mapping[str, object]) -> Mapping[str, object]:
    """The description of a tool's function, which may stand under "function"."""
    return mapping(tool.get("function", tool))


def is_strict(tool: Mapping[str, object]) -> bool:
    """Whether its arguments are promised to fit the schema."""
    return tool.get("strict") is True or function_of(tool).get("strict") is True


def call_rule(lark: Lark, tools: Tools, *, as_json: bool) -> str:
    """A rule for one call of any of the tools; `as_json` as Qwen3-Next writes calls.

    Arguments of tools that say `strict` fit their schema, or PromptError says what cannot be enforced; of others they
    fit what of it can be.
    """
    write = _json_call if as_json else _tagged_call
    return lark.rule(" | ".join(write(lark, tool) for tool in tools))


def _json_call(lark: Lark, tool: Mapping[str, object]) -> str:
    name, schema = tool_name(tool), _schema(tool)
    described = rooted({"type": "object", **schema}, schema)
    why = refused(json_schema(described, lenient=False))
    if why and is_strict(tool):
        raise PromptError(f"Tool {name} cannot be enforced: {why}. Leave that out of its schema.")
    if why and refused(json_schema(described, lenient=True)):
        described = {"type": "object"}
    arguments = lark.json(described, lenient=bool(why))
    opening = quoted(f'\n{{"name": {json.dumps(name, ensure_ascii=False)}, "arguments": ')
    return f'{lark.tag(OPENER)} {opening} {arguments} "}}\\n" {lark.tag(CLOSER)}'


def _tagged_call(lark: Lark, tool: Mapping[str, object]) -> str:
    name, schema = _written_name(tool_name(tool)), _schema(tool)
    where, lenient = f"Tool {name}", not is_strict(tool)
    values = Values(lark, schema, where, lenient=lenient)
    forms = [_parameters(lark, form, values) for form in _forms(schema, schema, where, lenient=lenient)]
    opening, closing = quoted(f"\n<function={name}>\n"), quoted("</function>\n")
    return f"{lark.tag(OPENER)} {opening} ({' | '.join(forms)}) {closing} {lark.tag(CLOSER)}"


def _schema(tool: Mapping[str, object]) -> Schema:
    function = function_of(tool)
    return mapping(function.get("parameters", function.get("input_schema")))


def _written_name(name: str | None) -> str:
    if name is None or re.search(r"[<>\n]", name):
        raise PromptError(f"{name!r:.60} cannot be written in a call; expected a name without <, > and line breaks.")
    return name


def _parameters(lark: Lark, form: Schema, values: Values) -> str:
    """The parameters in the schema's order, those that are not required with a choice."""
    named, required = mapping(form.get("properties")), [str(name) for name in items(form.get("required"))]
    rest = form.get("additionalProperties")
    written = []
    for name in dict.fromkeys([*named, *required]):
        value = values.rule(name, named.get(name, rest))
        one = lark.rule(f"{quoted(f'<parameter={_written_name(name)}>' + chr(10))} {value}")
        written.append(one if name in required else f"{one}?")
    return " ".join(written) or '""'


def _forms(schema: Schema, root: object, where: str, *, lenient: bool, depth: int = 0) -> Iterator[Schema]:
    """The objects that arguments may be: each with its properties and which are required."""
    unenforced = [key for key in _UNENFORCED if key in schema]
    if unenforced and not lenient:
        raise PromptError(f"{where} cannot be enforced: {unenforced[0]}. Leave that out of its schema.")
    forms: list[Schema] = [
        {key: schema[key] for key in ("properties", "required", "additionalProperties") if key in schema}
    ]
    if depth > 8:
        yield from forms
        return
    every: list[Sequence[object]] = [[part] for part in items(schema.get("allOf"))]
    every += [[target(schema, root)]] if "$ref" in schema else []
    every += [items(schema[key]) for key in ("anyOf", "oneOf") if key in schema]
    for parts in every:
        inner = [
            form
            for part in parts
            if isinstance(part, Mapping)
            for form in _forms(part, root, where, lenient=lenient, depth=depth + 1)
        ]
        forms = [_both(one, other) for one in forms for other in inner or [{}]]
    yield from forms


def _both(one: Schema, other: Schema) -> Schema:
    return {
        **other,
        **one,
        "properties": {**mapping(other.get("properties")), **mapping(one.get("properties"))},
        "required": [*items(one.get("required")), *items(other.get("required"))],
    }
