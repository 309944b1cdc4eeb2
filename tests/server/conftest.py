"""The bundled model behind a server, and the makers' own clients of it."""

from collections.abc import Iterator

import anthropic
import openai
import pytest

from tests.server.running import serving


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """Where the server listens."""
    with serving() as address:
        yield address


@pytest.fixture(scope="module")
def client(url: str) -> openai.OpenAI:
    """OpenAI's client."""
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def claude(url: str) -> anthropic.Anthropic:
    """Anthropic's client."""
    return anthropic.Anthropic(base_url=url, api_key="none", max_retries=0)
