"""One chat message in the making, out of the parts and items that protocols spread it over."""

from dataclasses import dataclass, field

from mlx_qwen.prompt.media_parts import Media


@dataclass(slots=True)
class Turn:
    """One message; `is_item`: it began with an item of reasoning or a call, so that more may follow."""

    role: str
    content: list[str | Media] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    calls: list[dict[str, object]] = field(default_factory=list)
    rest: dict[str, object] = field(default_factory=dict)
    is_item: bool = False

    def message(self) -> dict[str, object]:
        """The message in the one shape."""
        whole = all(isinstance(part, str) for part in self.content)
        content = "".join(map(str, self.content)) if whole else list(self.content)
        message: dict[str, object] = {"role": self.role, **self.rest, "content": content}
        reasoning = "\n\n".join(text for text in self.reasoning if text)
        if reasoning:
            message["reasoning_content"] = reasoning
        if self.calls:
            message["tool_calls"] = list(self.calls)
        return message

    def takes(self, later: "Turn") -> bool:
        """Whether `later` is the same answer going on: Responses list reasoning, words and calls one by one."""
        if self.role != "assistant" or later.role != "assistant":
            return False
        if later.is_item:
            return not later.reasoning or not self.content
        return self.is_item and not self.content and not self.calls

    def add(self, later: "Turn") -> None:
        """Goes on with what `later` holds."""
        self.content += later.content
        self.reasoning += later.reasoning
        self.calls += later.calls
        self.rest |= later.rest
