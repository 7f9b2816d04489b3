"""Serves a bundle and its page to browsers, as a page needs it that runs WebAssembly on several threads.

In: a bundle directory with `browser/` in it. Out: an address, and what the page sends back. Not here: the
page (`export/browser`), starting a browser (`evals/remote/remote_browser.py`).

Only files of the bundle are given out, and those of onnxruntime-web below `/browser/ort/`. The two headers of
cross-origin isolation let the page have shared memory and a fine clock.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import sys
import threading
from http import HTTPStatus
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any

from runtime import bundle as bundle_files
from runtime.errors import InputError, PocketError

RESULTS = "/results"
MODULE = "ort.wasm.min.mjs"
MOST_BYTES = 64 << 20
"""Of what a page sends back: a long sustained run has tens of thousands of numbers."""

TYPES = {".mjs": "text/javascript", ".js": "text/javascript", ".wasm": "application/wasm"}
HEADERS = {
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cache-Control": "no-cache",
}


def find_ort(bundle: Path) -> Path:
    """The directory of onnxruntime-web's files: beside the page, or by POCKETVLM_NODE_MODULES.

    Raises InputError saying how to get it.
    """
    modules = os.environ.get("POCKETVLM_NODE_MODULES")
    places = [bundle / "browser" / "ort"]
    if modules:
        places.append(Path(modules) / "onnxruntime-web" / "dist")
    for place in places:
        if (place / MODULE).is_file():
            return place
    raise InputError(
        f"{places[0]}: holds no onnxruntime-web; run npm install --ignore-scripts onnxruntime-web and set "
        "POCKETVLM_NODE_MODULES to its node_modules directory"
    )


class PageServer:
    """A server in a thread of its own; `results` waits for what a page sends. Use it as a context manager."""

    def __init__(self, bundle: Path, host: str = "127.0.0.1", port: int = 0) -> None:
        """Raises InputError for a bundle without a page, without onnxruntime-web, or a port that is taken."""
        bundle_files.read(bundle, verify=False)
        if not (bundle / "browser" / "index.html").is_file():
            raise InputError(f"{bundle}: has no browser/ in it; export it with --target browser")
        self.again = 0
        """How often a page that sends results is told to load anew and measure again (HTTP 205)."""
        self._received: queue.Queue[bytes] = queue.Queue()
        ort = find_ort(bundle)
        owner = self

        class Handler(_Handler):
            roots = (("/browser/ort/", ort.resolve()), ("/", bundle.resolve()))
            inbox = owner._received

            def do_POST(self) -> None:
                again, owner.again = owner.again, max(owner.again - 1, 0)
                self.take(again > 0)

        try:
            self._server = ThreadingHTTPServer((host, port), Handler)
        except OSError as error:
            raise InputError(
                f"{host}:{port}: cannot be listened on ({error.strerror}); take another port"
            ) from error
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    @property
    def address(self) -> str:
        """Of the page."""
        host, port = self._server.server_address[:2]
        return f"http://{host!s}:{port}/browser/"

    def results(self, seconds: float) -> dict[str, Any]:
        """What the page sent, an object. Raises TimeoutError, and InputError when it is none."""
        try:
            data = self._received.get(timeout=seconds)
        except queue.Empty:
            raise TimeoutError(f"no results within {seconds:.0f} s") from None
        try:
            found = json.loads(data)
        except ValueError as error:
            raise InputError(f"the page sent no JSON ({error}); open it anew") from error
        if not isinstance(found, dict):
            raise InputError(f"the page sent a JSON {type(found).__name__}, expected an object")
        return found

    def __enter__(self) -> PageServer:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Handler(SimpleHTTPRequestHandler):
    """GET of files below `roots` (the first prefix that fits), POST of results."""

    roots: tuple[tuple[str, Path], ...] = ()
    inbox: queue.Queue[bytes]
    extensions_map = {**SimpleHTTPRequestHandler.extensions_map, **TYPES}  # noqa: RUF012

    def send_head(self) -> Any:
        """A file, or 404 for what is no file of a root."""
        plain = self.path.split("?", 1)[0].split("#", 1)[0]
        for prefix, root in self.roots:
            if plain.startswith(prefix):
                self.directory = str(root)
                self._inner = "/" + plain[len(prefix) :]
                return super().send_head() if self._is_inside(root) else self._not_here()
        return self._not_here()

    def translate_path(self, path: str) -> str:
        """Of an address: its place below the root that it belongs to; of a file name beside it, too."""
        return super().translate_path(self._inner if path == self.path else path)

    def _is_inside(self, root: Path) -> bool:
        try:
            found = Path(super().translate_path(self._inner)).resolve()
        except ValueError:  # no name of a file, as one with a zero byte
            return False
        return found == root or root in found.parents

    def _not_here(self) -> None:
        self.send_error(HTTPStatus.NOT_FOUND)

    def list_directory(self, path: str | os.PathLike[str]) -> None:
        """Directories are not listed."""
        self._not_here()

    def end_headers(self) -> None:
        """Every answer is isolated."""
        for name, value in HEADERS.items():
            self.send_header(name, value)
        super().end_headers()

    def take(self, again: bool) -> None:
        """What a page found out; `again` tells it to load anew."""
        length = self.headers.get("Content-Length", "")
        if self.path != RESULTS or not length.isdigit() or int(length) > MOST_BYTES:
            self.close_connection = True
            self.send_error(HTTPStatus.BAD_REQUEST)
            return
        self.inbox.put(self.rfile.read(int(length)))
        self.send_response(HTTPStatus.RESET_CONTENT if again else HTTPStatus.NO_CONTENT)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Silence: the page says what it does."""


def main(arguments: list[str] | None = None) -> int:
    """Serve a bundle's page until interrupted; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m evals.page_server", description=main.__doc__)
    parser.add_argument("bundle", type=Path, help="a bundle exported with --target browser")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 for other machines, too")
    parser.add_argument("--port", type=int, default=8000)
    given = parser.parse_args(arguments)
    try:
        with PageServer(given.bundle, given.host, given.port) as server:
            print(server.address, flush=True)
            threading.Event().wait()
    except PocketError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
