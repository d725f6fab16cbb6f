"""A server of files on loopback, as data sets are published: ranges, entity tags, and faults on demand."""

from __future__ import annotations

import hashlib
import io
import re
import tarfile
import threading
import zipfile
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class ArchiveServer:
    """The server; use it as a context.

    Attributes:
        files: path -> content.
        asked: path and `Range` header of each request, in order.
        cut: called with path and first byte; after how many bytes the connection is dropped, None for never.
        ranges: whether it knows ranges.
        tags: whether it names versions.
        status: of every answer, in place of a file, where it is set.
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.asked: list[tuple[str, str | None]] = []
        self.cut: Callable[[str, int], int | None] = lambda path, first: None
        self.ranges = self.tags = True
        self.status: int | None = None
        handler = type("Handler", (_Handler,), {"owner": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> ArchiveServer:
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


class _Handler(BaseHTTPRequestHandler):
    owner: ArchiveServer

    def do_GET(self) -> None:
        owner, wanted = self.owner, self.headers.get("Range")
        owner.asked.append((self.path, wanted))
        if owner.status is not None or self.path not in owner.files:
            return self.send_error(owner.status or 404)
        content = owner.files[self.path]
        tag = f'"{hashlib.md5(content).hexdigest()}"'
        first, status = 0, 200
        if wanted and owner.ranges and self.headers.get("If-Range") in (None, tag):
            first, status = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1]), 206
            if first >= len(content):
                return self.send_error(416)
        self.send_response(status)
        self.send_header("Content-Length", str(len(content) - first))
        if status == 206:
            self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
        if owner.tags:
            self.send_header("ETag", tag)
        self.end_headers()
        cut = owner.cut(self.path, first)
        self.wfile.write(content[first:] if cut is None else content[first : first + cut])

    def log_message(self, *args: object) -> None:
        pass


def zipped(files: dict[str, bytes]) -> bytes:
    """A .zip of these files."""
    memory = io.BytesIO()
    with zipfile.ZipFile(memory, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return memory.getvalue()


def tarred(files: dict[str, bytes], links: dict[str, str] | None = None) -> bytes:
    """A .tar of these files, and of links to elsewhere."""
    memory = io.BytesIO()
    with tarfile.open(fileobj=memory, mode="w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        for name, target in (links or {}).items():
            member = tarfile.TarInfo(name)
            member.type, member.linkname = tarfile.SYMTYPE, target
            archive.addfile(member)
    return memory.getvalue()
