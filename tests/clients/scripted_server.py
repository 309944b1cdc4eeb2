"""A server whose engine computes everything, and whose tokens are those of a script.

    python -m tests.clients.scripted_server PORT CHECKPOINT SCRIPT RECORDS

SCRIPT is JSON, read at each request: a list of [question, answers]. The first whose question is in the last message,
or before the tool results that end the prompt, is taken, and of its answers the one after as many results as there are
behind the question. An answer is a text, or [tool, arguments], where the prompt has that tool. Each request leaves a
line of JSON in RECORDS: the ids of its prompt and of its answer, and how many of the prompt's were cached.
"""

import json
import sys
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path

from mlx_qwen.engine.rules import Rules
from mlx_qwen.engine.sequence import Sequence
from mlx_qwen.options import GenerationOptions
from mlx_qwen.prompt import Processor
from mlx_qwen.server import backend
from mlx_qwen.server.serve import serve
from mlx_qwen.server.settings import ServerSettings
from mlx_qwen.settings import EngineSettings

_USER, _RESULT, _END = "<|im_start|>user\n", "<tool_response>", "<|im_end|>"
_REASONING = "The script says what comes next.\n</think>\n\n"
_ASIDE = "Nothing to add."


@dataclass
class Scripted:
    """Forces the tokens of an answer, and notes the request with the first one."""

    sequence: Sequence
    answer: list[int]
    records: Path
    coming: list[int] = field(init=False)
    failure: str | None = None

    def __post_init__(self) -> None:
        self.coming = list(self.answer)

    def forced(self) -> int | None:
        return self.coming[0] if self.coming else None

    def allowed(self) -> None:
        return None

    def fork(self) -> "Scripted":
        return copy(self)

    def saw(self, token: int) -> None:
        if len(self.coming) == len(self.answer):
            line = {"prompt": self.sequence.ids, "answer": self.answer, "cached": self.sequence.cached}
            with self.records.open("a") as records:
                records.write(json.dumps(line) + "\n")
        self.coming = self.coming[1:]


def scripted_answer(prompt: str, script: list[list]) -> str:
    """What the script says to a prompt."""
    last = prompt[prompt.rindex(_USER) :]
    for question, answers in script:
        at = prompt.rfind(question)
        if at >= 0 and (question in last or _RESULT in last):
            answer = answers[min(prompt.count(_RESULT, at), len(answers) - 1)]
            if isinstance(answer, str):
                return answer
            if f'"name": "{answer[0]}"' in prompt:
                return _called(*answer)
    return _ASIDE


def _called(tool: str, arguments: dict[str, object]) -> str:
    """A call as the chat template writes it."""
    written = {key: value if isinstance(value, str) else json.dumps(value) for key, value in arguments.items()}
    parameters = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in written.items())
    return f"<tool_call>\n<function={tool}>\n{parameters}</function>\n</tool_call>"


def main(port: str, checkpoint: str, script: str, records: str) -> None:
    """Serves until it is told to end."""
    prepare = backend.prepare_async

    async def prepared(model, processor: Processor, *arguments, **keywords):
        request = await prepare(model, processor, *arguments, **keywords)
        sequence = request.sequence
        answer = scripted_answer(processor.decode(sequence.ids), json.loads(Path(script).read_text()))
        opened = _REASONING if processor.opens_thinking(sequence.ids) else ""
        sequence.rules = Rules([Scripted(sequence, processor.encode(opened + answer + _END), Path(records))])
        return request

    backend.prepare_async = prepared
    serve([checkpoint], ServerSettings(port=int(port)), GenerationOptions(), EngineSettings(mtp=0))


if __name__ == "__main__":
    main(*sys.argv[1:])
