"""serve: show a page's folder to browsers on this machine, with the headers that its `_headers` names.

On loopback alone, until Ctrl-C. What a host on the internet needs is in that file and in the folder's README.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

from pipeline.core import log
from pipeline.core.errors import ResourceError, UsageError
from pipeline.core.stage import guard

HEADERS = "_headers"


class Handler(SimpleHTTPRequestHandler):
    """A folder's files, each with the headers that are named for its path; what went well is not told."""

    protocol_version = "HTTP/1.1"
    extensions_map = {**SimpleHTTPRequestHandler.extensions_map, ".js": "text/javascript", ".wasm": "application/wasm"}

    def __init__(self, *arguments: object, named: Sequence[tuple[str, str, str]], directory: str) -> None:
        self._named = named
        super().__init__(*arguments, directory=directory)  # type: ignore[arg-type]

    def end_headers(self) -> None:
        path = urlsplit(self.path).path
        for pattern, name, value in self._named:
            if fnmatch(path, pattern):
                self.send_header(name, value)
        super().end_headers()

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        if str(code) >= "400":
            super().log_request(code, size)


class Server(ThreadingHTTPServer):
    """One that does not tell of browsers that went away."""

    def handle_error(self, request: object, client_address: object) -> None:
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


def headers(file: Path) -> Iterator[tuple[str, str, str]]:
    """Pattern of paths, name and value of each header in `file`: a line with the pattern, then indented ones."""
    pattern = ""
    for line in file.read_text(encoding="utf-8").splitlines():
        if line[:1].isspace():
            name, _, value = line.strip().partition(": ")
            yield pattern, name, value
        elif line:
            pattern = line


def server(folder: Path, port: int) -> Server:
    """A server of `folder` on loopback that has not begun; port 0 is any free one.

    Raises:
        UsageError: the folder is no page's.
        ResourceError: the port is taken.
    """
    if not (folder / HEADERS).is_file():
        raise UsageError(f"{folder} is no page", cause=f"it has no {HEADERS}", remedy="run `make page`")
    handler = partial(Handler, named=tuple(headers(folder / HEADERS)), directory=str(folder))
    try:
        return Server(("127.0.0.1", port), handler)
    except OSError as error:
        raise ResourceError(f"port {port} can't be had: {error.strerror}", remedy="name another: --port 0") from error


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.serve", description="Show a page on this machine.")
    parser.add_argument("folder", type=Path, help="what `make page` wrote")
    parser.add_argument("--port", type=int, default=8000, help="0: any free one (default: %(default)s)")
    arguments = parser.parse_args(argv)

    def work() -> None:
        with server(arguments.folder, arguments.port) as made:
            log.answer(f"http://127.0.0.1:{made.server_address[1]}/\n")
            log.line("Ctrl-C ends it")
            made.serve_forever()

    return guard(work, interrupted="")


if __name__ == "__main__":
    sys.exit(main())
