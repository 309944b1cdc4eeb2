"""What the server is told when it starts; flags follow."""

from collections.abc import Sequence
from dataclasses import dataclass

from mlx_qwen.declared import check_values, documented, option
from mlx_qwen.errors import PromptError
from mlx_qwen.machine import memory_bytes

_LOOPBACK = ("127.0.0.1", "::1", "localhost")


def _are_aliases(aliases: Sequence[str]) -> bool:
    return all(name and model for name, _, model in (alias.partition("=") for alias in aliases))


def _is_memory(memory: int | str) -> bool:
    return memory_bytes(memory) > 0


@documented
@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """How the server works.

    Raises PromptError for values that cannot be used.

    Attributes:
        {options}
    """

    host: str = option(
        "127.0.0.1", help="address to listen at; one that others can reach needs an API key.", flag="--host"
    )
    port: int = option(8080, help="port to listen at; 0 takes a free one.", least=0, most=65535, flag="--port")
    api_key: str | None = option(
        None,
        help="what clients must send as `Authorization: Bearer …` or `x-api-key`. MLX_QWEN_API_KEY in the environment "
        "keeps it out of lists of processes.",
        flag="--api-key",
    )
    alias: Sequence[str] = option(
        (),
        help="another name for a model; `*` in it stands for any text, as in `claude-*=MODEL`.",
        expected="texts like NAME=MODEL",
        check=_are_aliases,
        flag="--alias",
        metavar="NAME=MODEL",
    )
    max_context: int | None = option(
        None, help="most tokens of a prompt and its answer together.", least=1, flag="--max-context"
    )
    max_batch: int = option(16, help="answers that are written at the same time.", least=1, flag="--max-batch")
    max_queue: int = option(64, help="requests that wait; others are refused for now.", least=0, flag="--max-queue")
    max_body: int = option(64, help="largest body of a request, in MB.", least=1, flag="--max-body")
    max_images: int = option(64, help="most images and videos in a request.", least=0, flag="--max-images")
    max_image_pixels: float = option(
        64.0, help="largest image, in millions of pixels.", above=0, flag="--max-image-pixels"
    )
    memory: int | str | None = option(
        None,
        help="memory that the weights of all loaded models may take together, as 24GB (24 · 2^30 bytes, as Macs are "
        "sold) or in bytes; the least recently used goes first. Three quarters of the machine's memory by default.",
        check=_is_memory,
        flag="--memory",
        metavar="SIZE",
    )
    unload_after: float = option(
        1800.0,
        help="seconds without a request after which a model is unloaded; 0 keeps it.",
        least=0,
        flag="--unload-after",
    )
    allow_url: bool = option(False, help="Fetch images and videos from the web.", flag="--allow-url")
    allow_origin: Sequence[str] = option(
        (),
        help="web page that may use the server from a browser, such as https://chat.example; `*` is any.",
        flag="--allow-origin",
        metavar="ORIGIN",
    )
    allow_host: Sequence[str] = option(
        (),
        help="further name that the server may be called by, such as host.docker.internal.",
        flag="--allow-host",
        metavar="NAME",
    )
    log_prompts: bool = option(False, help="Write prompts and answers to the log.", flag="--log-prompts")
    heartbeat: float = option(5.0, help="seconds of silence after which a stream gives a sign of life.", above=0)

    def __post_init__(self) -> None:
        check_values(self)
        if self.host not in _LOOPBACK and not self.api_key:
            raise PromptError(
                f"host is {self.host!r}, where others can reach the server; give an API key too (--api-key, or "
                "MLX_QWEN_API_KEY), or leave the host out."
            )
