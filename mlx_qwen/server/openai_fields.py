"""Fields that OpenAI's protocols share, to keywords of `GenerationOptions`."""

from mlx_qwen.json_types import Json
from mlx_qwen.server.fields import Fields
from mlx_qwen.server.refusals import Body, Refusal

EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
MOST_ANSWERS = 16
MOST_STOPS = 16
MOST_TOP_LOGPROBS = 20


def given(choices: dict[str, object]) -> dict[str, object]:
    """Those of the choices that were made."""
    return {name: value for name, value in choices.items() if value is not None}


def sampling(fields: Fields) -> dict[str, object]:
    """How tokens are drawn, with the fields that other local servers know beside OpenAI's."""
    return given(
        {
            "temperature": fields.number("temperature", least=0, most=2),
            "top_p": fields.number("top_p", least=0, most=1),
            "top_k": fields.whole("top_k", least=0),
            "min_p": fields.number("min_p", least=0, most=1),
            "presence_penalty": fields.number("presence_penalty", least=-2, most=2),
            "frequency_penalty": fields.number("frequency_penalty", least=-2, most=2),
            "repetition_penalty": fields.number("repetition_penalty", least=0),
            "xtc_probability": fields.number("xtc_probability", least=0, most=1),
            "xtc_threshold": fields.number("xtc_threshold", least=0, most=0.5),
            "seed": fields.whole("seed", least=0, most=2**63 - 1),
            "stop": fields.texts("stop", most=MOST_STOPS) or None,
            "logit_bias": _biases(fields),
        }
    )


def thinking(fields: Fields) -> dict[str, object]:
    """Whether and how long to reason, as local servers' clients write it."""
    return given(
        {
            "enable_thinking": _optional_flag(fields, "enable_thinking"),
            "thinking_budget": fields.whole("thinking_budget", least=0),
            "chat_template_kwargs": fields.inner("chat_template_kwargs").body or None,
        }
    )


def tool_choice(value: Json, names: list[str], path: str = "tool_choice") -> object:
    """OpenAI's tool_choice as the option takes it; None where it asks for nothing."""
    if value is None or value == "auto":
        return None
    if value == "none":
        return "none"
    name = None
    if isinstance(value, dict):
        function = value.get("function")
        name = function.get("name") if isinstance(function, dict) else value.get("name")
        if value.get("type") == "allowed_tools":
            raise Refusal(400, f"{path} of type allowed_tools is not supported; send those tools alone.", param=path)
        if value.get("type") != "function" or not isinstance(name, str):
            raise Refusal(400, f"{path} names no function.", param=path)
    elif value != "required":
        raise Refusal(400, f"{path} is {value!r:.40}; expected auto, none, required or a function.", param=path)
    if name is not None and name not in names:
        raise Refusal(400, f"{path} names {name!r:.60}, which is not among the tools.", param=path)
    if not names:
        raise Refusal(400, f"{path} asks for a call, but the request holds no function tools.", param=path)
    return name or "required"


def _optional_flag(fields: Fields, name: str) -> bool | None:
    return None if fields.body.get(name) is None else fields.flag(name)


def _biases(fields: Fields) -> dict[int, float] | None:
    biases = fields.inner("logit_bias")
    read: dict[int, float] = {}
    for token in biases.body:
        if not token.isascii() or not token.isdigit():
            raise Refusal(400, f"logit_bias names {token!r:.40}; expected the ids of tokens.", param="logit_bias")
        bias = biases.number(token, least=-100, most=100)
        read[int(token)] = 0.0 if bias is None else float(bias)
    return read or None


def usage(prompt: int, written: int, cached: int, reasoning: int) -> Body:
    """Chat's and completions' usage."""
    return {
        "prompt_tokens": prompt,
        "completion_tokens": written,
        "total_tokens": prompt + written,
        "prompt_tokens_details": {"cached_tokens": cached},
        "completion_tokens_details": {"reasoning_tokens": reasoning},
    }
