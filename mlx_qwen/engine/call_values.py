"""A parameter's value as it stands in a tool call, as a grammar: text as it is, anything else as JSON."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence

from mlx_qwen.answer.schemas import Schema, items, mapping, target, type_names
from mlx_qwen.answer.tool_values import is_plain_text
from mlx_qwen.answer.validation import accepts
from mlx_qwen.errors import PromptError

END = "\n</parameter>\n"
# One blank, or a line break and its indentation: no model can go on with blanks for ever.
WHITESPACE = "( |\\n[ \\t]{0,64})"
# A text that holds no markup, so that it ends where it seems to.
_TEXT = r"/(?s:.*)/ & ~/(?s:.*)(<\/?tool_call>|<\/?function[=>]|<\/?parameter[=> \/])(?s:.*)/"
_FORMATS = {
    "date": r"[0-9]{4}-(0[1-9]|1[0-2])-(0[1-9]|1[0-9]|2[0-8])",
    "time": r"([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\.[0-9]{1,9})?(Z|[+-]([01][0-9]|2[0-3]):[0-5][0-9])",
    "uuid": r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}",
    "ipv4": r"((25[0-5]|2[0-4][0-9]|1?[0-9]?[0-9])\.){3}(25[0-5]|2[0-4][0-9]|1?[0-9]?[0-9])",
    "email": r"[A-Za-z0-9_+-]{1,64}(\.[A-Za-z0-9_+-]{1,32}){0,4}@[A-Za-z0-9-]{1,63}(\.[A-Za-z0-9-]{1,63}){1,4}",
}
_FORMATS["date-time"] = f"{_FORMATS['date']}T{_FORMATS['time']}"
_COMBINING = ("anyOf", "oneOf", "allOf", "$ref", "enum", "const")
_NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_LISTED = ("anyOf", "oneOf", "allOf", "prefixItems")
_PLAIN = ("const", "enum", "default", "examples", "example", "required")


class Lark:
    """A grammar in llguidance's Lark, rule by rule; `tags` are texts that are one token each, told apart from text."""

    def __init__(self, tags: Sequence[str]) -> None:
        self._lines: list[str] = []
        self._tags = tuple(tags)

    def tag(self, text: str) -> str:
        """A tag, as its token where it is one."""
        return text if text in self._tags else quoted(text)

    def rule(self, body: str) -> str:
        """Adds a rule and returns its name."""
        name = f"r{len(self._lines)}"
        self._lines.append(f"{name}: {body}")
        return name

    def text(self, terminal: str, end: str) -> str:
        """Adds a rule for text that fits a terminal and goes up to `end`, the first that comes."""
        number = len(self._lines)
        name = f"r{number}"
        self._lines.append(f"{name}[lazy]: T{number}\nT{number}: ({terminal}) {quoted(end)}")
        return name

    def json(self, schema: object, *, lenient: bool) -> str:
        """Adds a rule for JSON that a schema accepts."""
        return self.rule(f"%json {json.dumps(json_schema(schema, lenient=lenient))}")

    def starting_with(self, body: str) -> str:
        """The whole grammar."""
        return "\n".join([f"start: {body}", *self._lines, ""])


def quoted(text: str) -> str:
    """A text as a Lark literal."""
    return json.dumps(text, ensure_ascii=False)


def json_schema(schema: object, *, lenient: bool) -> dict[str, object]:
    """A schema for llguidance; `lenient`: without the keywords that cannot be enforced."""
    described = dict(schema) if isinstance(schema, Mapping) else {"anyOf": [schema is not False]}
    return {**described, "x-guidance": {"whitespace_pattern": WHITESPACE, "lenient": lenient}}


def refused(schema: Schema) -> str:
    """Why llguidance cannot enforce a schema; "" where it can."""
    from llguidance import LLMatcher

    wrong, messages = LLMatcher.validate_grammar_with_warnings(LLMatcher.grammar_from_json_schema(dict(schema)))
    return _why(messages[0]) if wrong else ""


def _why(message: str) -> str:
    """The line of an error that says what is wrong."""
    lines = [line.strip() for line in message.splitlines()]
    return next((line.removeprefix("error: ") for line in lines if line.startswith("error: ")), lines[0])


class Values:
    """Values of one tool's parameters.

    `where` names the tool in errors. `lenient`: what cannot be enforced is left out rather than refused.
    """

    def __init__(self, lark: Lark, root: object, where: str, *, lenient: bool) -> None:
        self._lark, self._root, self._where, self._lenient = lark, root, where, lenient

    def rule(self, name: str, schema: object) -> str:
        """A rule for the value of parameter `name`, with what ends it.

        Raises PromptError for a schema that cannot be enforced.
        """
        found = dict.fromkeys(self._alternatives(schema, f"{self._where}, {name}", 0))
        if not found:
            raise PromptError(f"{self._where}, {name}: no value is accepted. Loosen what contradicts itself.")
        return self._lark.rule(" | ".join(found))

    def _alternatives(self, schema: object, where: str, depth: int) -> Iterator[str]:
        """Lark expressions that are the schema together, each with what ends a value."""
        if schema is False:
            return
        if not isinstance(schema, Mapping):
            yield self._lark.text(_TEXT, END)
        elif "enum" in schema or "const" in schema:
            yield from self._listed(schema, where)
        elif any(key in schema for key in _COMBINING) and depth < 16:
            for part in self._parts(schema):
                yield from self._alternatives(part, where, depth + 1)
        else:
            yield from self._typed(schema, where)

    def _listed(self, schema: Schema, where: str) -> Iterator[str]:
        for value in [schema["const"]] if "const" in schema else items(schema["enum"]):
            if not accepts(schema, value, self._root):  # type: ignore[arg-type]
                continue
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            if re.search(r"</?(?:tool_call|function|parameter)", text):
                raise PromptError(f"{where}: {text!r:.60} cannot be written in a call, whose markup it holds.")
            yield quoted(text + END)

    def _parts(self, schema: Schema) -> Iterator[object]:
        """What judges the same value instead: one of these, each with the keywords beside it."""
        rest = {key: value for key, value in schema.items() if key not in ("anyOf", "oneOf", "allOf", "$ref")}
        merged, either = rest, [key for key in ("anyOf", "oneOf") if key in schema]
        for part in [*items(schema.get("allOf")), *([target(schema, self._root)] if "$ref" in schema else [])]:
            merged = self._merged(merged, part)
        parts = [merged]
        for key in either:
            parts = [self._merged(one, part) for one in parts for part in items(schema[key])]
        yield from parts

    def _merged(self, one: dict[str, object], other: object) -> dict[str, object]:
        if not isinstance(other, Mapping):
            return one
        shared = [key for key in one if key in other and one[key] != other[key] and key not in ("title", "description")]
        if shared and not self._lenient:
            raise PromptError(f"{self._where}: {shared[0]} is said twice for one value. Say it in one place.")
        return {**other, **one}

    def _typed(self, schema: Schema, where: str) -> Iterator[str]:
        names = type_names(schema)
        if is_plain_text(schema, self._root) and not {"minLength", "maxLength", "format"} & schema.keys():
            yield self._lark.text(_TEXT, END)
            return
        if names is None or "string" in names:
            yield self._lark.text(self._text(schema, where), END)
        kinds = [] if names is None else sorted(names - {"string"})
        if kinds:
            yield f"{self._json({**schema, 'type': kinds}, where)} {quoted(END)}"

    def _json(self, schema: Schema, where: str) -> str:
        described = rooted(schema, self._root)
        why = refused(json_schema(described, lenient=False))
        if why and not self._lenient:
            raise PromptError(f"{where} cannot be enforced: {why}. Leave that out of its schema.")
        if why and refused(json_schema(described, lenient=True)):
            return self._lark.json({"type": schema["type"]}, lenient=True)
        return self._lark.json(described, lenient=bool(why))

    def _text(self, schema: Schema, where: str) -> str:
        """The terminal of a text."""
        terms = [_TEXT]
        least, most = schema.get("minLength"), schema.get("maxLength")
        if least is not None or most is not None:
            terms.append(f"/(?s:.{{{least or 0},{'' if most is None else most}}})/")
        pattern, format_ = schema.get("pattern"), schema.get("format")
        for regex in ([_searched(pattern)] if isinstance(pattern, str) else []) + [_FORMATS.get(str(format_), "")]:
            if not regex:
                continue
            term = f"/{_escaped(regex)}/"
            why = _refused_term(term)
            if why and not self._lenient:
                raise PromptError(f"{where}: pattern {pattern!r:.60} cannot be enforced: {why}.")
            terms += [] if why else [term]
        return " & ".join(terms)


def _refused_term(term: str) -> str:
    from llguidance import LLMatcher

    wrong, messages = LLMatcher.validate_grammar_with_warnings(f"start: T\nT: {term}")
    return _why(messages[0]) if wrong else ""


def _escaped(regex: str) -> str:
    from llguidance import regex_to_lark

    return regex_to_lark(regex, "dw")


def _searched(pattern: str) -> str:
    """A regex for texts in which `pattern` is found, as JSON schema means it; anchors only where a branch ends."""
    branches, start, depth, in_class, escaped = [], 0, 0, False, False
    for at, sign in enumerate(pattern):
        if escaped or sign == "\\":
            escaped = not escaped
        elif in_class or sign == "[":
            in_class = sign != "]"
        elif sign in "()":
            depth += 1 if sign == "(" else -1
        elif sign == "|" and depth == 0:
            branches.append(pattern[start:at])
            start = at + 1
    branches.append(pattern[start:])
    return "|".join(f"({_anywhere(branch)})" for branch in branches)


def _anywhere(branch: str) -> str:
    before = "" if branch.startswith("^") else "(?s:.*)"
    at_end = re.search(r"(?<!\\)(?:\\\\)*\$\Z", branch) is not None
    inner = branch.removeprefix("^")
    return f"{before}({inner[:-1] if at_end else inner}){'' if at_end else '(?s:.*)'}"


def rooted(schema: Schema, root: object) -> dict[str, object]:
    """A part of a tool's schema that stands by itself, in JSON schema's own words."""
    written = _plain(schema)
    assert isinstance(written, dict), "a dictionary stays one"
    if '"$ref"' not in json.dumps(written, default=str):
        return written
    inner = mapping(written.get("$defs"))
    return {**written, "$defs": {**inner, "root": _plain(root)}}


def _plain(schema: object) -> object:
    """A schema with the types' full names, `nullable` as a type, and references below `$defs/root`."""
    if isinstance(schema, list | tuple):
        return [_plain(one) for one in schema]
    if not isinstance(schema, Mapping):
        return schema
    written: dict[str, object] = {}
    for key, value in schema.items():
        if key in _NAMED:
            written[key] = {name: _plain(part) for name, part in mapping(value).items()}
        elif key == "$ref":
            written[key] = f"#/$defs/root{str(value)[1:]}" if str(value).startswith("#") else value
        elif key == "type":
            written[key] = sorted(type_names(schema) or ())
        elif key != "nullable":
            written[key] = value if key in _PLAIN else _plain(value)
    return written
