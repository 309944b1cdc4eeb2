"""What the tools that a model was given say about the calls it writes."""

from collections.abc import Mapping

from mlx_qwen.answer.schemas import Schema, check_schema, items, mapping, target
from mlx_qwen.answer.tool_values import is_plain_text, typed_value
from mlx_qwen.answer.validation import accepts
from mlx_qwen.errors import PromptError
from mlx_qwen.json_types import Json, Tools


class Parameters:
    """The parameters of one function; without a schema any name may be one, and every value is text."""

    def __init__(self, schema: object = None) -> None:
        self._root = schema
        self._schemas: dict[str, object] = {}
        self._rest: object = None
        if isinstance(schema, Mapping):
            self._collect(schema)
            self._rest = schema.get("additionalProperties")

    def __contains__(self, name: str) -> bool:
        """Whether a parameter of this name can be given."""
        return not self._schemas or name in self._schemas or self._rest not in (None, False)

    def declares(self, name: str) -> bool:
        """Whether the schema lists a parameter of this name."""
        return name in self._schemas

    def is_text(self, name: str) -> bool:
        """Whether the value is text as it stands, so that it needs no end to be passed on."""
        return is_plain_text(self._schema(name), self._root)

    def value(self, name: str, text: str) -> Json:
        """The value that `text` stands for."""
        return typed_value(text, self._schema(name), self._root)

    def checked(self, arguments: dict[str, Json]) -> dict[str, Json]:
        """Arguments that came as JSON; text is typed where the schema does not accept it as text."""
        return {
            name: self.value(name, value)
            if isinstance(value, str) and not accepts(self._schema(name), value, self._root)
            else value
            for name, value in arguments.items()
        }

    def _schema(self, name: str) -> object:
        return self._schemas.get(name, self._rest)

    def _collect(self, schema: Schema) -> None:
        """The properties of a schema and of the parts that it is put together from."""
        for name, part in mapping(schema.get("properties")).items():
            self._schemas[name] = {"allOf": [self._schemas[name], part]} if name in self._schemas else part
        for part in (target(schema, self._root), *items(schema.get("allOf"))):
            if isinstance(part, Mapping):
                self._collect(part)
        for key in ("anyOf", "oneOf"):
            either: dict[str, list[object]] = {}
            for part in items(schema.get(key)):
                for name, one in Parameters._of(part, self._root).items():
                    either.setdefault(name, []).append(one)
            for name, parts in either.items():
                self._schemas.setdefault(name, {"anyOf": parts})

    @staticmethod
    def _of(part: object, root: object) -> dict[str, object]:
        inner = Parameters()
        inner._root = root
        if isinstance(part, Mapping):
            inner._collect(part)
        return inner._schemas


class ToolSchemas:
    """The functions that can be called, in OpenAI's forms or Anthropic's; PromptError for schemas without sense."""

    def __init__(self, tools: Tools | None) -> None:
        self._functions: dict[str, Parameters] = {}
        for index, tool in enumerate(tools or ()):
            function = tool.get("function", tool) if isinstance(tool, Mapping) else None
            if not isinstance(function, Mapping):
                raise PromptError(f"Tool {index} is {tool!r:.60}; expected the JSON description of a function.")
            name = str(function.get("name"))
            schema = function.get("parameters", function.get("input_schema"))
            check_schema(schema, f"Tool {name}", schema)
            self._functions[name] = Parameters(schema)

    def __contains__(self, name: str) -> bool:
        """Whether a function of this name was given."""
        return name in self._functions

    def may_name(self, name: str) -> bool:
        """Whether a call of this function can be meant: any, where no tools are known."""
        return not self._functions or name in self._functions

    def parameters(self, name: str) -> Parameters:
        """The parameters of a function; of one that is not known, those without a schema."""
        return self._functions.get(name) or _UNKNOWN


_UNKNOWN = Parameters()
