"""What reaches the app: no strangers' pages, no addresses to fetch, no endless bodies, inputs of the right kind.

`Guard` stands before Gradio's server and sees requests; `check_inputs` stands before the components and sees values.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Iterable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import gradio as gr
from gradio.utils import get_upload_folder

MAX_REQUEST_BYTES = 4_000_000  # of anything but an upload; 300 words of the longest kind are 0.4 MB
FORM_BYTES = 10_000  # what a form has around its file
IDLE_S = 30  # how long a body may pause
LOOPBACK = ("127.0.0.1", "localhost", "::1")

ADDRESS = re.compile(r"\s*[a-z][a-z0-9+.-]+:", re.IGNORECASE)  # one letter is a drive of Windows
FETCHES = re.compile(r"/(proxy=|file[=/]\s*[a-z][a-z0-9+.-]+:)", re.IGNORECASE)  # Gradio would fetch these

Scope = dict[str, Any]
Message = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class Guard:
    """An ASGI middleware. Refuses with a status and a sentence.

    Gradio answers any origin with `Access-Control-Allow-Credentials` where the host is not local. Here a request's
    origin never reaches it, so no other page may read an answer; browsers say themselves when a request comes from
    another page (`Sec-Fetch-Site`), and such a one starts no work.

    Args:
        app: What comes after it.
        max_upload_bytes: Largest upload.
        hosts: Names that the page may be called by; None is any. A page of this machine alone that is called by
            another name is being called by a stranger's page (DNS rebinding).
    """

    def __init__(self, app: Any, max_upload_bytes: int, hosts: Iterable[str] | None = None) -> None:
        self.app = app
        self.max_upload_bytes = max_upload_bytes
        self.hosts = None if hosts is None else frozenset(hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        limit = self.max_upload_bytes + FORM_BYTES if scope["path"].endswith("/upload") else MAX_REQUEST_BYTES
        refusal = self.refusal(scope, headers, limit)
        if refusal is not None:
            await answer(send, *refusal)
            return
        started = False

        async def watched(message: Message) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await send(message)

        inside = {**scope, "headers": [pair for pair in scope["headers"] if pair[0] != b"origin"]}
        try:
            await self.app(inside, limited(receive, limit), watched)
        except BodyError as error:
            if not started:
                await answer(send, *error.args)

    def refusal(self, scope: Scope, headers: dict[str, str], limit: int) -> tuple[int, str] | None:
        """Status and sentence for a request that is not let in, judged by its head."""
        host = urlsplit(f"//{headers.get('host', '')}").hostname
        if self.hosts is not None and host not in self.hosts:
            return 403, "This page is served to its own machine; call it 127.0.0.1, or name the host in SPAR_HOSTS."
        if FETCHES.search(scope["path"]):
            return 403, "Addresses are not fetched. Download the file and upload it."
        if scope["method"] not in ("GET", "HEAD") and headers.get("sec-fetch-site") in ("cross-site", "same-site"):
            return 403, "Requests from other pages are not taken."
        length = headers.get("content-length", "0")
        if not length.isdigit() or int(length) > limit:
            return 413, too_large(limit)
        return None


class BodyError(Exception):
    """A body that is too long or pauses too long; status and sentence."""


def too_large(limit: int) -> str:
    return f"The request is too large; at most {limit / 1e6:.1f} MB are taken."


def limited(receive: Receive, limit: int) -> Receive:
    """`receive` for a body of at most so many bytes that keeps coming."""
    seen, complete = 0, False

    async def receive_some() -> Message:
        nonlocal seen, complete
        if complete:  # what follows is the disconnect, which may take hours
            return await receive()
        try:
            message = await asyncio.wait_for(receive(), IDLE_S)
        except asyncio.TimeoutError:
            raise BodyError(408, "The request stopped coming. Send it again.") from None
        seen += len(message.get("body", b""))
        complete = not message.get("more_body", False)
        if seen > limit:
            raise BodyError(413, too_large(limit))
        return message

    return receive_some


async def answer(send: Send, status: int, sentence: str) -> None:
    """A refusal as plain text."""
    body = sentence.encode()
    headers = [
        (b"content-type", b"text/plain; charset=utf-8"),
        (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def check_inputs(names: Sequence[str], components: Sequence[Any], values: Sequence[Any]) -> None:
    """Whether each value is of the kind that its component takes.

    Args:
        names: What the values are called.
        components: Gradio's.
        values: As the request brought them.

    Raises:
        Refused: One is not; the sentence names it and holds no path.
    """
    if len(components) != len(values):
        raise Refused(f"{len(values)} values came; give {len(components)}: {', '.join(names)}.")
    for name, component, value in zip(names, components, values, strict=True):
        if isinstance(component, gr.Image):
            _check_upload(name, value)
        elif isinstance(component, gr.Slider):
            low, high = component.minimum, component.maximum
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if not is_number or not low <= value <= high:  # NaN is neither
                raise Refused(f"{name} is {value!r:.40}; give a number from {low:g} to {high:g}.")
        elif isinstance(component, gr.Dropdown):
            allowed = [choice for _, choice in component.choices]
            several = component.multiselect and isinstance(value, list)
            if not all(part in allowed for part in (value if several else [value])):
                raise Refused(f"{name} is {value!r:.40}; choose one of {', '.join(map(repr, allowed))}.")
        elif isinstance(component, gr.Textbox) and not isinstance(value, str | None):
            raise Refused(f"{name} is of type {type(value).__name__}; give text.")


def _check_upload(name: str, value: Any) -> None:
    if value is None:
        return
    path = value.get("path") if isinstance(value, dict) else None
    url = value.get("url") if isinstance(value, dict) else value
    if any(isinstance(text, str) and ADDRESS.match(text) for text in (path, None if path else url)):
        raise Refused(f"{name} is an address; only uploads are taken. Download the file and upload it.")
    if not isinstance(path, str) or "\0" in path or not _is_upload(path):
        raise Refused(f"{name} is no upload; only uploads are taken. Upload the file first (handle_file does so).")


def _is_upload(path: str) -> bool:
    folder = Path(get_upload_folder()).resolve()
    try:
        place = Path(path).resolve()
        return place.is_relative_to(folder) and place.is_file()
    except (OSError, RuntimeError, ValueError):
        return False


class Refused(gr.Error):
    """A request that is not taken; a sentence for the visitor and nothing for the log."""

    def __init__(self, sentence: str) -> None:
        super().__init__(sentence, print_exception=False)
