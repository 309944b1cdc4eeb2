"""Finds a checkpoint's chat template and renders messages with it."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from mlx_qwen.errors import CheckpointError, PromptError
from mlx_qwen.json_files import read_json_object
from mlx_qwen.json_types import Json
from mlx_qwen.prompt.jinja import compile_template, render

_DEVELOPER = re.compile(r"""(['"])developer\1""")
# The trailing space tells whether the template trims the content that it is given.
_CUT_HERE = "<<|cut here|>> "
_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True)
class ChatTemplate:
    """Named Jinja sources; "default" is used unless tools are given and a "tool_use" one exists, as in transformers.

    `special_tokens` (bos_token, eos_token, ...) are variables that a template may print.
    """

    sources: dict[str, str]
    special_tokens: dict[str, Json] = field(default_factory=dict)

    @classmethod
    def from_directory(cls, path: Path, tokenizer_config: dict[str, Json]) -> "ChatTemplate | None":
        """Reads chat_template.jinja, chat_template.json or tokenizer_config.json's entry, in this order.

        Raises CheckpointError when the first of them that is there cannot be read.
        """
        sources: dict[str, str] = {}
        if (path / "chat_template.jinja").is_file():
            sources["default"] = _text_of(path / "chat_template.jinja")
            for extra in sorted((path / "additional_chat_templates").glob("*.jinja")):
                sources[extra.stem] = _text_of(extra)
        elif (path / "chat_template.json").is_file():
            file = path / "chat_template.json"
            sources = _named(read_json_object(file).get("chat_template"), file)
            if not sources:
                raise CheckpointError(f'{file} has no entry "chat_template". Download it again.')
        else:
            sources = _named(tokenizer_config.get("chat_template"), path / "tokenizer_config.json")
        if not sources:
            return None
        names = [name for name in tokenizer_config if name.endswith("_token")]
        tokens = {name: token_text(name, tokenizer_config[name]) for name in names}
        return cls(sources, {name: text for name, text in tokens.items() if text is not None})

    def source(self, *, tools: bool = False) -> str:
        """The Jinja text used for a conversation with or without tools."""
        if tools and "tool_use" in self.sources:
            return self.sources["tool_use"]
        if "default" not in self.sources:
            names = ", ".join(sorted(self.sources))
            raise CheckpointError(f'None of the chat templates is named "default" (found: {names}).')
        return self.sources["default"]

    def default_thinking(self) -> bool | None:
        """Whether an answer is reasoned when nothing is said about it; None when the template knows no thinking."""
        if not any("think" in source for source in self.sources.values()):
            return None
        unsaid, direct = self._opening({}), self._opening({"enable_thinking": False})
        return unsaid != direct or unsaid == self._opening({"enable_thinking": True})

    def known_roles(self, messages: list[dict[str, Json]], *, tools: bool = False) -> list[dict[str, Json]]:
        """The messages, with developers as systems unless the template has words for them."""
        if _DEVELOPER.search(self.source(tools=tools)):
            return messages
        return [{**one, "role": "system"} if one["role"] == "developer" else one for one in messages]

    def mentions(self, name: str) -> bool:
        """Whether any of the sources has this word, as one that reads a variable does."""
        return any(re.search(rf"\b{name}\b", source) for source in self.sources.values())

    def takes(self, variables: dict[str, Json]) -> bool:
        """Whether a plain question with these variables is not refused."""
        try:
            self._opening(variables)
        except PromptError:
            return False
        return True

    def _opening(self, variables: dict[str, Json]) -> str:
        question: dict[str, Json] = {"role": "user", "content": "?"}
        return self.render([question], tools=None, add_generation_prompt=True, variables=variables)

    def render(
        self,
        messages: list[dict[str, Json]],
        *,
        tools: list[Json] | None,
        add_generation_prompt: bool,
        variables: dict[str, Json],
    ) -> str:
        """The prompt text; raises PromptError with the template's own words when it refuses the messages."""
        told: dict[str, Json] = {
            "documents": None,
            **self.special_tokens,
            **variables,
            "messages": cast(Json, messages),
            "tools": tools,
            "add_generation_prompt": add_generation_prompt,
        }
        return render(compile_template(self.source(tools=tools is not None)), told)

    def render_unfinished(
        self, messages: list[dict[str, Json]], *, tools: list[Json] | None, variables: dict[str, Json]
    ) -> str:
        """The prompt text up to the end of the last message's content, for the model to continue it."""
        last = messages[-1]["content"]
        if not isinstance(last, str):
            raise PromptError(
                "The last message holds an image or video, so that it cannot be continued; end with text alone."
            )
        marked = [*messages[:-1], {**messages[-1], "content": last + _CUT_HERE}]
        text = self.render(marked, tools=tools, add_generation_prompt=False, variables=variables)
        cut = text.rfind(_CUT_HERE.strip())
        if cut < 0 or last.strip() not in text:
            raise PromptError("The chat template drops the last message, so that it cannot be continued.")
        return text[:cut] if text.startswith(_CUT_HERE, cut) else text[:cut].rstrip()


def token_text(name: str, token: Json) -> str | None:
    """The text of a special token, which tokenizer_config.json holds as a string or as a dictionary; None for none.

    Raises CheckpointError for a token that transformers names too and that is neither.
    """
    text = token.get("content") if isinstance(token, dict) else token
    if isinstance(text, str):
        return text
    if token is not None and name in _SPECIAL_TOKENS:
        raise CheckpointError(
            f"tokenizer_config.json says {name} is {token!r:.200}, expected a text or an object with its content. "
            "Correct it there, or download the file again."
        )
    return None


def _text_of(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read as text ({error}). Download it again.") from error


def _named(template: Json, file: Path) -> dict[str, str]:
    """Sources by name from the forms that `file` may hold: one text, a list of {"name", "template"}, or a mapping."""
    named = {"default": template} if isinstance(template, str) else {} if template is None else template
    if isinstance(template, list):
        entries = [entry if isinstance(entry, dict) else {} for entry in template]
        named = {str(entry.get("name")): entry.get("template") for entry in entries}
    if not isinstance(named, dict) or not all(isinstance(source, str) for source in named.values()):
        raise CheckpointError(f"The chat template in {file} is neither a text nor named texts. Download it again.")
    return {name: str(source) for name, source in named.items()}
