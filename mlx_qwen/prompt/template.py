"""Finds a checkpoint's chat template and renders messages with it."""

import json
from dataclasses import dataclass, field
from pathlib import Path

from jinja2 import TemplateError, TemplateSyntaxError

from mlx_qwen.errors import CheckpointError, PromptError
from mlx_qwen.prompt.jinja import compile_template
from mlx_qwen.prompt.json_types import Json

# The trailing space tells whether the template trims the content that it is given.
_CUT_HERE = "<<|cut here|>> "


@dataclass(frozen=True)
class ChatTemplate:
    """Named Jinja sources; "default" is used unless tools are given and a "tool_use" one exists, as in transformers.

    `special_tokens` (bos_token, eos_token, ...) are variables that a template may print.
    """

    sources: dict[str, str]
    special_tokens: dict[str, Json] = field(default_factory=dict)

    @classmethod
    def from_directory(cls, path: Path, tokenizer_config: dict[str, Json]) -> "ChatTemplate | None":
        """Reads chat_template.jinja, chat_template.json or tokenizer_config.json's entry, in this order."""
        sources: dict[str, str] = {}
        if (path / "chat_template.jinja").is_file():
            sources["default"] = (path / "chat_template.jinja").read_text(encoding="utf-8")
            for extra in sorted((path / "additional_chat_templates").glob("*.jinja")):
                sources[extra.stem] = extra.read_text(encoding="utf-8")
        elif (path / "chat_template.json").is_file():
            sources = _named(json.loads((path / "chat_template.json").read_text(encoding="utf-8"))["chat_template"])
        else:
            sources = _named(tokenizer_config.get("chat_template"))
        if not sources:
            return None
        names = [name for name in tokenizer_config if name.endswith("_token")]
        tokens = {name: token_text(tokenizer_config[name]) for name in names}
        return cls(sources, {name: text for name, text in tokens.items() if text is not None})

    def source(self, *, tools: bool = False) -> str:
        """The Jinja text used for a conversation with or without tools."""
        if tools and "tool_use" in self.sources:
            return self.sources["tool_use"]
        if "default" not in self.sources:
            names = ", ".join(sorted(self.sources))
            raise CheckpointError(f'None of the chat templates is named "default" (found: {names}).')
        return self.sources["default"]

    def render(
        self,
        messages: list[dict[str, Json]],
        *,
        tools: list[Json] | None,
        add_generation_prompt: bool,
        variables: dict[str, Json],
    ) -> str:
        """The prompt text; raises PromptError with the template's own words when it refuses the messages."""
        try:
            template = compile_template(self.source(tools=tools is not None))
            return template.render(
                **{**self.special_tokens, **variables},
                messages=messages,
                tools=tools,
                documents=None,
                add_generation_prompt=add_generation_prompt,
            )
        except TemplateSyntaxError as error:
            raise CheckpointError(
                f"The chat template is no valid Jinja, line {error.lineno}: {error.message}"
            ) from error
        except (TemplateError, TypeError) as error:
            raise PromptError(f"The chat template refused the messages: {error}") from error

    def render_unfinished(
        self, messages: list[dict[str, Json]], *, tools: list[Json] | None, variables: dict[str, Json]
    ) -> str:
        """The prompt text up to the end of the last message's content, for the model to continue it."""
        last = str(messages[-1]["content"])
        marked = [*messages[:-1], {**messages[-1], "content": last + _CUT_HERE}]
        text = self.render(marked, tools=tools, add_generation_prompt=False, variables=variables)
        cut = text.rfind(_CUT_HERE.strip())
        if cut < 0 or last.strip() not in text:
            raise PromptError("The chat template drops the last message, so that it cannot be continued.")
        return text[:cut] if text.startswith(_CUT_HERE, cut) else text[:cut].rstrip()


def token_text(token: Json) -> str | None:
    """The text of a special token, which tokenizer_config.json holds as a string or as a dictionary."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _named(template: Json) -> dict[str, str]:
    if isinstance(template, str):
        return {"default": template}
    if isinstance(template, list):
        entries = [entry for entry in template if isinstance(entry, dict)]
        return {str(entry["name"]): str(entry["template"]) for entry in entries}
    if isinstance(template, dict):
        return {name: str(source) for name, source in template.items()}
    return {}
