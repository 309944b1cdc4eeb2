"""What can be typed in a chat besides questions: /image, /set and their like."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

import click

from mlx_qwen.cli.chat import saved
from mlx_qwen.cli.chat.paths import are_files, destination, sources
from mlx_qwen.cli.chat.talk import Talk
from mlx_qwen.cli.chat.typed import chosen_options, typed_option
from mlx_qwen.cli.reading import read_tools
from mlx_qwen.errors import PromptError
from mlx_qwen.media.grids import Kind

# A path or a comment in code begins with a slash, too.
_COMMAND = re.compile(r"/([A-Za-z?]\w*)?(?=\s|$)")


@dataclass(frozen=True, slots=True)
class Command:
    """What stands behind the word, what help says, and what it does; it returns what to tell the user."""

    arguments: str
    help: str
    run: Callable[[Talk, str], str | None]


def obey(talk: Talk, text: str) -> None:
    """Runs a command, or asks a question; raises MLXQwenError when that cannot be, EOFError at the chat's end."""
    found = _COMMAND.match(text)
    if found is None:
        if are_files(text):
            raise PromptError("That is a file. Put /image or /video in front of it to show it with a question.")
        talk.ask(text)
        return
    word = {"/quit": "/exit", "/?": "/help"}.get(found[0], found[0])
    if word not in COMMANDS:
        near = get_close_matches(word, COMMANDS, n=1)
        meant = f" Did you mean {near[0]}?" if near else ""
        raise PromptError(f"Unknown command {word}.{meant} There are {', '.join(COMMANDS)}.")
    said = COMMANDS[word].run(talk, text[found.end() :].strip())
    if said:
        click.echo(said, err=word not in ("/help", "/stats", "/set", "/fold"))


def _attach(kind: Kind) -> Callable[[Talk, str], str | None]:
    def attach(talk: Talk, text: str) -> str | None:
        name = kind.name.lower()
        if not text:
            raise PromptError(f"/{name} needs the path or URL of the {name}.")
        seen = [talk.conversation.attach(kind, source) for source in sources(text)]
        return "\n".join(f"{one}; it goes with your next question." for one in seen)

    return attach


def _set(talk: Talk, text: str) -> str | None:
    if text:
        talk.conversation.choose(typed_option(text))
    options = chosen_options(talk.conversation.options, talk.conversation.settings)
    return ", ".join(f"{name} {value}" for name, value in options.items())


def _think(talk: Talk, text: str) -> str | None:
    now = talk.conversation.options.enable_thinking
    words = {"on": True, "off": False, "": not now}
    if text.isdecimal():
        talk.conversation.choose({"enable_thinking": True, "thinking_budget": int(text)})
        return f"Answers begin with reasoning, of at most {int(text):,} tokens."
    if text not in words:
        raise PromptError(f"/think is followed by on, off or the most tokens of reasoning, found {text!r:.40}.")
    talk.conversation.choose({"enable_thinking": words[text], "thinking_budget": None})
    return "Answers begin with reasoning." if words[text] else "Answers come without reasoning."


def _fold(talk: Talk, text: str) -> str | None:
    talk.folded = not talk.folded
    if talk.folded:
        return "Reasoning is folded to a line from now on."
    return click.style(talk.reasoning(), dim=True) or "Reasoning is shown from now on."


def _tools(talk: Talk, text: str) -> str | None:
    tools = read_tools(str(destination(text))) if text else None
    talk.conversation.choose({"tools": tools})
    return f"The model may call {len(tools)} tools; /result gives it what one returned." if tools else "No tools."


def _system(talk: Talk, text: str) -> str | None:
    talk.conversation.reset()
    talk.conversation.system = text or None
    return None


def _undo(talk: Talk, text: str) -> str | None:
    question = talk.conversation.undo()
    if question is None:
        raise PromptError("There is no question to take back.")
    return f"Taken back: {question.strip()[:60]}"


def _reset(talk: Talk, text: str) -> str | None:
    talk.conversation.reset()
    return None


def _save(talk: Talk, text: str) -> str | None:
    file = _named(text, "/save")
    saved.save(talk.conversation, file, model=talk.model)
    return f"{file} holds {len(talk.conversation.turns)} messages."


def _load(talk: Talk, text: str) -> str | None:
    saved.load(talk.conversation, _named(text, "/load"))
    return f"The conversation goes on behind {len(talk.conversation.turns)} messages."


def _named(text: str, word: str) -> Path:
    if not text:
        raise PromptError(f"{word} needs the path of a file, such as {word} chat.json.")
    return destination(text)


def _exit(talk: Talk, text: str) -> str | None:
    raise EOFError


def _help(talk: Talk, text: str) -> str | None:
    lines = [(f"{word} {one.arguments}".strip(), one.help) for word, one in COMMANDS.items()]
    width = max(len(typed) for typed, _ in lines) + 2
    return "\n".join(f"{typed:{width}}{help_}" for typed, help_ in lines)


COMMANDS = {
    "/image": Command("PATH", "show images with the next question; drag them here, or give URLs", _attach(Kind.IMAGE)),
    "/video": Command("PATH", "show a video with the next question", _attach(Kind.VIDEO)),
    "/set": Command("OPTION VALUE", "choose an option, such as temperature 0.7; alone, list what is chosen", _set),
    "/think": Command("[on|off|N]", "reason before answers, for at most N tokens, or not", _think),
    "/fold": Command("", "fold reasoning to a line, or show it again, the last answer's too", _fold),
    "/tools": Command("FILE", "functions that the model may call, as JSON; without FILE, none", _tools),
    "/result": Command("TEXT", "what the function returned that the model called", Talk.result),
    "/system": Command("TEXT", "set the system message and start anew; without TEXT, remove it", _system),
    "/undo": Command("", "take back the last question and its answer", _undo),
    "/reset": Command("", "forget the conversation", _reset),
    "/save": Command("FILE", "keep the conversation as JSON, pictures by path", _save),
    "/load": Command("FILE", "go on with a conversation that was saved", _load),
    "/stats": Command("", "tokens, speed and memory of the last answer", Talk.statistics),
    "/help": Command("", "show this list", _help),
    "/exit": Command("", "leave, as /quit and Ctrl-D do; Ctrl-C stops an answer, or clears the line", _exit),
}
