"""The Jinja environment that Hugging Face chat templates are written for."""

import json
from datetime import datetime
from functools import lru_cache
from typing import NoReturn

from jinja2 import Template, nodes
from jinja2.exceptions import TemplateError, TemplateSyntaxError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser

from mlx_qwen.errors import CheckpointError, PromptError
from mlx_qwen.json_types import Json
from mlx_qwen.prompt.metered import MeteredEnvironment

_MOST_SOURCE = 1_000_000
_MOST_WORDS = 500


class GenerationTag(Extension):
    """Renders what stands between `{% generation %}` and `{% endgeneration %}`: a training mark, of no use here."""

    tags = {"generation"}  # noqa: RUF012, jinja2 declares it as an instance variable

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without Jinja's HTML escaping: the model reads `<`, not `\\u003c`."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: object = "") -> NoReturn:
    raise TemplateError(str(message)[:_MOST_WORDS])


def _now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


@lru_cache(maxsize=16)
def compile_template(source: str) -> Template:
    """Compiles a chat template in a sandbox: it may come from anyone, and must not reach the file system.

    Raises CheckpointError when the source is not valid Jinja.
    """
    environment = MeteredEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, loopcontrols])
    environment.add_filter("tojson", _to_json)
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = _now
    try:
        if len(source) > _MOST_SOURCE:
            raise ValueError(f"{len(source):,} letters, expected at most {_MOST_SOURCE:,}")
        return environment.from_string(source)
    except TemplateSyntaxError as error:
        raise CheckpointError(f"The chat template is no valid Jinja, line {error.lineno}: {error.message}") from error
    except Exception as error:  # Python's compiler gives up on deep nesting in several ways
        raise CheckpointError(f"The chat template is no valid Jinja ({error!r:.200}).") from error


def render(template: Template, variables: dict[str, Json]) -> str:
    """The text of a compiled template; raises PromptError for whatever goes wrong in it, also when it never ends."""
    environment = template.environment
    assert isinstance(environment, MeteredEnvironment), "made by compile_template"
    try:
        return environment.metered(variables, lambda: template.render(variables))
    except (TemplateError, TypeError) as error:
        raise PromptError(f"The chat template refused the messages: {error!s:.{_MOST_WORDS}}") from error
    except Exception as error:
        raise PromptError(f"The chat template fails with these messages ({error!r:.{_MOST_WORDS}}).") from error
