"""A server on this machine that answers as the Hugging Face Hub does, for what huggingface_hub asks of it."""

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote

REPOSITORY = "someone/tiny"
COMMIT = "c0ffee" + "0" * 34


@dataclass
class FakeHub:
    """One repository, whose files are those of `folder`; counts what was served, and can break off."""

    repository: str
    folder: Path
    url: str = ""
    served: dict[str, int] = field(default_factory=dict)
    breaks_after: int | None = None
    """How many bytes of weights are served: the answer that exceeds them is cut off, and those after it are refused."""

    def served_weights(self) -> int:
        """Bytes of safetensors files that were sent, headers too."""
        return sum(nbytes for name, nbytes in self.served.items() if name.endswith(".safetensors"))

    def info(self) -> dict[str, object]:
        """What the Hub says of the repository."""
        siblings = [
            {"rfilename": file.name, "size": file.stat().st_size, "blobId": _digest(file)[:40]}
            for file in sorted(self.folder.iterdir())
        ]
        return {"id": self.repository, "modelId": self.repository, "sha": COMMIT, "siblings": siblings}


MakeHub = Callable[[Path], FakeHub]


@contextmanager
def serve(hub: FakeHub) -> Iterator[FakeHub]:
    """Answer for `hub` on a free port of this machine, at `hub.url`."""

    class Handler(_Handler):
        pass

    Handler.hub = hub
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def log_message(self, format: str, *arguments: object) -> None:
        """Say nothing."""

    def _answer(self, *, with_body: bool) -> None:
        path = unquote(self.path.partition("?")[0])
        repository = re.escape(self.hub.repository)
        if re.fullmatch(f"/api/models/{repository}(/revision/[^/]+)?", path):
            self._send_json(self.hub.info())
        elif re.fullmatch(f"/api/models/{repository}/tree/[^/]+", path):
            self._send_json([_tree_entry(file) for file in sorted(self.hub.folder.iterdir())])
        elif (match := re.fullmatch(f"/{repository}/resolve/[^/]+/([^/]+)", path)) and self._file(match[1]).is_file():
            self._send_file(self._file(match[1]), with_body=with_body)
        else:
            self._send_error(404, "EntryNotFound" if match else "RepoNotFound")

    def _file(self, name: str) -> Path:
        return self.hub.folder / name

    def _send_error(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _send_json(self, content: object) -> None:
        data = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _send_file(self, file: Path, *, with_body: bool) -> None:
        limit = self.hub.breaks_after
        if limit is not None and file.suffix == ".safetensors" and self.hub.served_weights() >= limit:
            self._send_error(403, "Gone")
            return
        data = file.read_bytes()
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        start, stop = 0, len(data)
        if wanted:
            start, stop = int(wanted[1]), min(int(wanted[2] or stop) + bool(wanted[2]), stop)
        self.send_response(206 if wanted else 200)
        if wanted:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(data)}")
        self.send_header("Content-Length", str(stop - start))
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", f'"{_digest(file)}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if with_body:
            self._send_counted(file.name, data[start:stop])

    def _send_counted(self, name: str, data: bytes) -> None:
        limit = self.hub.breaks_after
        if limit is not None and name.endswith(".safetensors"):
            data = data[: max(0, limit - self.hub.served_weights())]
            self.close_connection = True
        self.hub.served[name] = self.hub.served.get(name, 0) + len(data)
        self.wfile.write(data)


def _tree_entry(file: Path) -> dict[str, object]:
    return {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": _digest(file)[:40]}
