"""Asks a model the questions of the demo's tasks and shows its answers beside the right ones."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from textwrap import indent

import click

from mlx_qwen.demo.tasks import Example
from mlx_qwen.demo.tasks.drawing import draw_clip, draw_scene
from mlx_qwen.demo.tasks.example import Message, Part, call_text
from mlx_qwen.generation import generate, stream_generate
from mlx_qwen.model import Model
from mlx_qwen.prompt import Processor

_MOST_TOKENS = 256


class Asker:
    """Puts examples to a model and counts the right answers.

    The model sees pictures and frame sequences through the PNG and GIF files that are written into `folder`;
    `pictures` are their paths so far.
    """

    def __init__(self, model: Model, processor: Processor, folder: Path) -> None:
        self.asked = 0
        self.right = 0
        self.pictures: list[Path] = []
        self._model = model
        self._processor = processor
        self._folder = folder

    def ask(self, example: Example) -> None:
        """Shows an example turn by turn: every question, the model's answer to it and the right one."""
        if not example.messages:
            self._go_on(example)
            return
        messages = list(self._with_files(example))
        if example.tools:
            _show("tools", ", ".join(_name(tool) for tool in example.tools))
        for index, message in enumerate(messages):
            if message["role"] == "assistant":
                self._answer(example, messages[:index], message)
            else:
                _show(str(message["role"]), _shown(message["content"]))

    def _go_on(self, example: Example) -> None:
        beginning = example.text[: example.cut]
        _show("text", beginning)
        room = len(self._processor.encode(example.answer))
        self._compare(generate(self._model, self._processor, beginning, max_tokens=room), example.answer)

    def _answer(self, example: Example, history: list[Message], right: Message) -> None:
        """The model's answer to a history in which the earlier answers are the right ones."""
        *_, last = stream_generate(
            self._model,
            self._processor,
            history,
            max_tokens=_MOST_TOKENS,
            enable_thinking="reasoning_content" in right,
            tools=list(example.tools),
        )
        answer = last.answer
        assert answer is not None, "the last response carries the whole answer"
        if answer.reasoning:
            _show("thinks", answer.reasoning.strip(), dim=True)
        calls = answer.message.get("tool_calls")
        self._compare(answer.content + call_text(calls), str(right["content"]) + call_text(right.get("tool_calls")))

    def _compare(self, answer: str, right: str) -> None:
        same = answer.strip() == right.strip()
        self.asked += 1
        self.right += same
        _show("model", answer.strip(), colour="green" if same else "red")
        _show("right", right.strip())

    def _with_files(self, example: Example) -> Iterator[Message]:
        """The messages, with the paths of files in the place of pictures and frame sequences."""
        media = iter([*self._save_pictures(example), *self._save_frames(example)])
        for message in example.messages:
            content = message["content"]
            if isinstance(content, list):
                content = [part if part["type"] == "text" else next(media) for part in content]
            yield {**message, "content": content}

    def _save_pictures(self, example: Example) -> Iterator[Part]:
        for scene in example.pictures:
            path = self._new_file("picture", "png")
            draw_scene(scene).save(path)
            yield {"type": "image", "image": str(path)}

    def _save_frames(self, example: Example) -> Iterator[Part]:
        for clip in example.clips:
            path = self._new_file("frames", "gif")
            first, *others = draw_clip(clip)
            first.save(path, append_images=others, save_all=True, duration=round(1000 / clip.frames_per_second), loop=0)
            yield {"type": "video", "video": str(path)}

    def _new_file(self, name: str, kind: str) -> Path:
        self._folder.mkdir(parents=True, exist_ok=True)
        self.pictures.append(self._folder / f"{name}-{len(self.pictures) + 1}.{kind}")
        return self.pictures[-1]


def _shown(content: object) -> str:
    """A message as a line or more: its files by name, then its text."""
    if not isinstance(content, list):
        return str(content)
    return " ".join(str(part[part["type"]]) for part in content)


def _name(tool: Mapping[str, object]) -> str:
    function = tool["function"]
    assert isinstance(function, Mapping), "a tool describes a function"
    return str(function["name"])


def _show(who: str, text: str, *, dim: bool = False, colour: str | None = None) -> None:
    shown = click.style(indent(text, " " * 10).lstrip(), dim=dim, fg=colour)
    click.echo(f"  {who:<8}{shown}")
