"""Fetches a picture from the web: from public addresses only, within a time and a size, whatever the server does."""

import os
import socket
from concurrent.futures import Future
from concurrent.futures import TimeoutError as Late
from http.client import HTTPConnection, HTTPResponse, HTTPSConnection
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address
from threading import Thread
from urllib.request import (
    HTTPDefaultErrorHandler,
    HTTPErrorProcessor,
    HTTPHandler,
    HTTPRedirectHandler,
    HTTPSHandler,
    OpenerDirector,
    ProxyHandler,
    Request,
)

from mlx_qwen.errors import PromptError

# Set by who trusts the addresses in prompts, as those that come to a server may not be.
PRIVATE_ALLOWED = "MLX_QWEN_PRIVATE_URLS"
# Where networks of version 6 alone put the addresses of version 4 (RFC 6052).
_TRANSLATED = IPv6Network("64:ff9b::/96")
_SILENT_SECONDS = 30
_TOTAL_SECONDS = 300
_PIECE = 1 << 18


class _PrivateAddressError(Exception):
    """The host is this machine or one of a private network; no OSError, which urllib would wrap."""


def download(url: str, most_bytes: int) -> bytes:
    """The bytes at an http(s) address, redirections followed.

    Raises PromptError when it cannot be read, holds more than `most_bytes`, takes longer than five minutes, or leads to
    this machine or a private network, unless MLX_QWEN_PRIVATE_URLS is 1.
    """
    fetched: Future[bytes] = Future()
    # A thread of its own, as a server may keep any single read waiting just short of its limit.
    Thread(target=_fetch, args=(fetched, url, most_bytes), daemon=True).start()
    try:
        data = fetched.result(_TOTAL_SECONDS)
    except Late as error:
        raise PromptError(
            f"{url:.200} is not there after {_TOTAL_SECONDS:,} seconds. Download it and pass the file."
        ) from error
    except _PrivateAddressError as error:
        raise PromptError(
            f"{url:.200} leads to {error}, which is this machine or one of a private network. Pass the file, or set "
            f"{PRIVATE_ALLOWED}=1 if you trust every address in your prompts."
        ) from error
    except Exception as error:  # whatever urllib and http.client make of a stranger's answer
        raise PromptError(f"{url:.200} cannot be downloaded ({error}). Check the address, or pass a file.") from error
    if len(data) > most_bytes:
        raise PromptError(f"{url:.200} is larger than {most_bytes >> 20} MB. Download it and pass the file.")
    return data


def _fetch(fetched: "Future[bytes]", url: str, most_bytes: int) -> None:
    try:
        request = Request(url, headers={"User-Agent": "mlx-qwen"})
        data = bytearray()
        with _opener().open(request, timeout=_SILENT_SECONDS) as response:
            while len(data) <= most_bytes and not fetched.cancelled() and (piece := response.read1(_PIECE)):
                data += piece
        fetched.set_result(bytes(data))
    except Exception as error:
        fetched.set_exception(error)


def _opener() -> OpenerDirector:
    """What opens http and https alone, also behind redirections."""
    opener = OpenerDirector()
    for handler in (ProxyHandler, _Http, _Https, HTTPRedirectHandler, HTTPDefaultErrorHandler, HTTPErrorProcessor):
        opener.add_handler(handler())
    return opener


def _check_peer(connected: socket.socket) -> None:
    """Raises _PrivateAddressError for a connection to anywhere but a public address.

    The address that was reached is looked at, not the name, which may stand for another one the next time.
    """
    address = str(connected.getpeername()[0]).partition("%")[0]
    if not is_public(address) and os.environ.get(PRIVATE_ALLOWED) != "1":
        connected.close()
        raise _PrivateAddressError(address)


def is_public(address: str) -> bool:
    """Whether an address of the internet, also one of version 4 that stands within one of version 6."""
    found = ip_address(address)
    if isinstance(found, IPv6Address):
        within = found.ipv4_mapped or found.sixtofour
        if found in _TRANSLATED:
            within = IPv4Address(int(found) & 0xFFFFFFFF)
        if within is not None:
            found = within
    return found.is_global and not found.is_multicast


class _HttpConnection(HTTPConnection):
    def connect(self) -> None:
        super().connect()
        _check_peer(self.sock)


class _HttpsConnection(HTTPSConnection):
    def connect(self) -> None:
        super().connect()
        _check_peer(self.sock)


class _Http(HTTPHandler):
    def http_open(self, req: Request) -> HTTPResponse:
        return self.do_open(HTTPConnection if req.has_proxy() else _HttpConnection, req)


class _Https(HTTPSHandler):
    def https_open(self, req: Request) -> HTTPResponse:
        return self.do_open(HTTPSConnection if getattr(req, "_tunnel_host", None) else _HttpsConnection, req)
