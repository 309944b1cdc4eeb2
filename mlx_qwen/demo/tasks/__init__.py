"""Questions with right answers, drawn without end: what the demo checkpoint was trained on and is measured with."""

from mlx_qwen.demo.tasks import arithmetic, clips, continuation, pictures, recall, talk, toolbox
from mlx_qwen.demo.tasks.example import Draw, Example, draw

# Every kind of example by name.
TASKS: dict[str, Draw] = {
    "arithmetic_reasoned": arithmetic.reasoned,
    "arithmetic_direct": arithmetic.direct,
    "arithmetic_several": arithmetic.several,
    "recall_short": recall.short,
    "recall_long": recall.long,
    "recall_one": recall.one_question,
    "repeat": recall.repeat,
    "picture": pictures.one,
    "pictures": pictures.several,
    "clip": clips.happening,
    "tool_call": toolbox.call,
    "tool_answer": toolbox.answered,
    "tool_turns": toolbox.several,
    "talk": talk.small_talk,
    "introduced": talk.introduced,
    "counting": continuation.counting,
    "order": continuation.order,
    "tale": continuation.tale,
}

__all__ = ["TASKS", "Draw", "Example", "draw"]
