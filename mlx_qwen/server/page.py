"""The page at `/`: one file, whose own script and style are all that may run in it, and which talks to no one else."""

import re
from base64 import b64encode
from functools import cache
from hashlib import sha256
from importlib.resources import files

from starlette.requests import Request
from starlette.responses import HTMLResponse, Response


async def page(request: Request) -> Response:
    """The page."""
    text, policy = _page()
    headers = {
        "content-security-policy": policy,
        "referrer-policy": "no-referrer",
        "x-content-type-options": "nosniff",
        "cache-control": "no-cache",
    }
    return HTMLResponse(text, headers=headers)


@cache
def _page() -> tuple[str, str]:
    """The file, and the policy that lets a browser run nothing but what stands in it."""
    text = files("mlx_qwen.server").joinpath("page.html").read_text(encoding="utf-8")
    script, style = (
        " ".join(f"'sha256-{b64encode(sha256(part.encode()).digest()).decode()}'" for part in re.findall(inside, text))
        for inside in (r"(?s)<script>(.*?)</script>", r"(?s)<style>(.*?)</style>")
    )
    policy = (
        f"default-src 'none'; script-src {script}; style-src {style}; img-src data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return text, policy
