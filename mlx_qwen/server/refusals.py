"""What the server refuses, and how each protocol says so."""

from typing import TypeAlias

from mlx_qwen.errors import MLXQwenError, PromptError, RanksEndedError
from mlx_qwen.json_types import Json

Body: TypeAlias = dict[str, Json]

# How Anthropic names the kinds of errors, by status.
_ANTHROPIC = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "request_too_large",
    421: "permission_error",
    429: "rate_limit_error",
    503: "overloaded_error",
}
_OPENAI = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class Refusal(Exception):  # noqa: N818, what it is
    """A request that gets no answer: an HTTP status and what to do next.

    `param` names the field that is wrong, `code` what is wrong in OpenAI's words, `details` in Anthropic's, and
    `retry_after` seconds to wait.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        details: Body | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.details = details
        self.status, self.message, self.param, self.code, self.retry_after = status, message, param, code, retry_after

    @property
    def headers(self) -> dict[str, str]:
        """Headers that go with it."""
        return {} if self.retry_after is None else {"retry-after": str(self.retry_after)}


def refusal_of(error: BaseException) -> Refusal:
    """What a client is told of an error; of those that nobody foresaw, no details."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, PromptError):
        too_long = "context ends at" in str(error)
        return Refusal(400, str(error), code="context_length_exceeded" if too_long else None)
    if isinstance(error, RanksEndedError):
        return Refusal(503, str(error), code="server_error")
    if isinstance(error, MLXQwenError):
        return Refusal(500, str(error), code="server_error")
    if isinstance(error, RecursionError):
        return Refusal(400, "The request is nested too deeply.")
    return Refusal(500, "The server failed at this request; its log says why.", code="server_error")


def openai_error(refusal: Refusal) -> Body:
    """The error as OpenAI's protocols give it."""
    default = "invalid_request_error" if refusal.status < 500 else "server_error"
    kind = _OPENAI.get(refusal.status, default)
    error: Body = {"message": refusal.message, "type": kind, "param": refusal.param, "code": refusal.code}
    return {"error": error}


def anthropic_error(refusal: Refusal) -> Body:
    """The error as Anthropic's protocol gives it."""
    named = f"{refusal.param}: {refusal.message}" if refusal.param else refusal.message
    kind = _ANTHROPIC.get(refusal.status, "api_error" if refusal.status >= 500 else "invalid_request_error")
    error: Body = {"type": kind, "message": named}
    return {"type": "error", "error": {**error, "details": refusal.details} if refusal.details else error}
