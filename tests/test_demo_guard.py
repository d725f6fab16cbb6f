"""What strangers try on the page: paths, addresses, foreign pages, endless bodies, inputs of the wrong kind."""

from __future__ import annotations

import asyncio
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

pytest.importorskip("gradio")
import gradio as gr

from spar_hf.checkpoints import ASSETS
from spar_hf.demo import guard, handlers
from spar_hf.demo.app import OWN_METHOD, build, serve
from spar_hf.demo.guard import Guard, Refused, check_inputs
from spar_hf.demo.settings import Settings

ROOT = Path(__file__).parents[1]
PICTURE = ASSETS / "pictures" / "demo.png"
WORDS = "cake; sky; sand"
STRANGER = "https://evil.example"


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    demo = build(Settings(model="tiny", device="cpu", max_file_mb=2, max_labels=40))
    yield serve(demo, block=False).rstrip("/")
    demo.close()


@pytest.fixture(scope="module")
def upload(address) -> str:
    """Path of an upload on the server."""
    file = io.BytesIO()
    Image.radial_gradient("L").resize((96, 64)).save(file, format="PNG")
    return httpx.post(f"{address}/gradio_api/upload", files={"files": ("x.png", file.getvalue())}).json()[0]


def file_data(path: Any) -> dict[str, Any]:
    return {"path": path, "meta": {"_type": "gradio.FileData"}}


def call(address: str, name: str, data: list[Any]) -> str:
    """The events that an endpoint sends."""
    body = json.dumps({"data": data})  # writes NaN, as programs do
    headers = {"content-type": "application/json"}
    answer = httpx.post(f"{address}/gradio_api/call/{name}", content=body, headers=headers)
    if answer.status_code != 200:
        return answer.text
    return httpx.get(f"{address}/gradio_api/call/{name}/{answer.json()['event_id']}", timeout=120).text


def shows_the_server(text: str) -> bool:
    return any(place in text for place in (os.getcwd(), str(ROOT), str(Path.home()), "root:", "Traceback"))


# --- the picture is an upload, and nothing else ------------------------------------------------------------------


PATHS = [
    "../x",
    "x",
    "",
    "/etc/passwd",
    str(PICTURE),
    "../../etc/passwd",
    "~/.bashrc",
    "a\0b",
    "x" * 5000,
    f"{os.environ.get('GRADIO_TEMP_DIR', '/tmp')}/../../etc/passwd",
]


@pytest.mark.parametrize("path", PATHS, ids=range(len(PATHS)))
def test_a_path_is_no_picture(path):
    for picture in (file_data(path), {"path": path}, path):
        with pytest.raises(Refused, match="picture is no upload; only uploads are taken") as caught:
            check_inputs(["picture"], [gr.Image()], [picture])
        assert not shows_the_server(caught.value.message)


@pytest.mark.parametrize("path", ["../x", str(PICTURE)])
def test_the_server_refuses_a_path_and_shows_nothing_of_itself(address, path):
    for picture in (file_data(path), {"path": path}, path):
        text = call(address, "segment", [picture, WORDS, "tiny", OWN_METHOD, 0, []])
        assert "event: error" in text and "picture is no upload; only uploads are taken" in text, text
        assert not shows_the_server(text)


def test_an_upload_is_a_picture(address, upload):
    text = call(address, "segment", [file_data(upload), WORDS, "tiny", OWN_METHOD, 0, []])
    assert "event: complete" in text and '"size_hw": [64, 96]' in text


ADDRESSES = [
    "http://127.0.0.1:1/x.png",
    "https://example.com/x.png",
    "HTTPS://example.com/x.png",
    "file:///etc/passwd",
    "ftp://example.com/x.png",
    "data:image/png;base64,AAAA",
]


@pytest.mark.parametrize("url", ADDRESSES)
def test_the_picture_is_no_address(address, url, monkeypatch):
    monkeypatch.setattr(
        "gradio.processing_utils.async_ssrf_protected_download", lambda *a, **k: pytest.fail("fetched")
    )
    for picture in (file_data(url), {**file_data(None), "url": url}, {"url": url}, url):
        text = call(address, "segment", [picture, WORDS, "tiny", OWN_METHOD, 0, []])
        assert "event: error" in text and "picture is an address; only uploads are taken" in text, text
        assert not shows_the_server(text)
    for route in ("file=", "proxy=", "file/"):
        answer = httpx.get(f"{address}/gradio_api/{route}{url}")
        assert answer.status_code in (403, 404) and not shows_the_server(answer.text)


def kinds() -> tuple[list[str], list[Any]]:
    """Names and components of one of each kind."""
    components = [gr.Textbox(), gr.Dropdown(["a", "b"]), gr.Slider(0, 1)]
    return ["words", "model", "x"], components


@pytest.mark.parametrize(
    "values, says",
    [
        ([7, "a", 0], "words is of type int; give text."),
        ([["car"], "a", 0], "words is of type list; give text."),
        (["car", 3, 0], "model is 3; choose one of 'a', 'b'."),
        (["car", ["a"], 0], "model is ['a']; choose one of 'a', 'b'."),
        (["car", {"a": 1}, 0], "model is {'a': 1}; choose one of 'a', 'b'."),
        (["car", "a", "0.5"], "x is '0.5'; give a number from 0 to 1."),
        (["car", "a", float("nan")], "x is nan; give a number from 0 to 1."),
        (["car", "a", float("inf")], "x is inf; give a number from 0 to 1."),
        (["car", "a", -0.1], "x is -0.1; give a number from 0 to 1."),
        (["car", "a", 10**400], f"x is 1{'0' * 39}; give a number from 0 to 1."),
        (["car", "a", True], "x is True; give a number from 0 to 1."),
        (["car", "a", None], "x is None; give a number from 0 to 1."),
        (["car"], "1 values came; give 3: words, model, x."),
    ],
)
def test_inputs_of_the_wrong_kind_get_a_sentence(values, says):
    with pytest.raises(Refused) as caught:
        check_inputs(*kinds(), values)
    assert caught.value.message == says


def test_inputs_of_the_right_kind_pass():
    for values in (["car", "a", 0], [None, "b", 1.0], ["", "b", 1e-300]):
        check_inputs(*kinds(), values)


@pytest.mark.parametrize(
    "name, data, says",
    [
        ("segment", [None, WORDS, "tiny", OWN_METHOD, 0, []], "There is no picture yet"),
        ("segment", [None, WORDS], "2 values came; give 6: picture, words, model, method, background_threshold"),
        ("segment", [None, "z" * 1_000_000, "tiny", OWN_METHOD, 0, []], "at most 8000 are read"),
        ("segment", [None, WORDS, "tiny", OWN_METHOD, 0, ["pamr", "x"]], "refine is ['pamr', 'x']; choose one of"),
        ("similarity", [None, "tiny", OWN_METHOD, float("nan"), 0.5], "x is nan; give a number from 0 to 1"),
        ("compare", [None, WORDS, "tiny", "proxyclip"], "method is 'proxyclip'; choose one of"),
    ],
)
def test_the_endpoints_tell_in_words(address, name, data, says):
    text = call(address, name, data)
    assert "event: error" in text and says in json.loads(text.split("data: ", 1)[1])["error"], text
    assert not shows_the_server(text)


@pytest.mark.parametrize("data", [{}, {"x": float("nan"), "y": 0.5}, {"x": "a", "y": 0}, {"x": 2, "y": 0}, None])
def test_a_click_outside_the_picture_is_told_in_words(data):
    page = handlers.Page(Settings(model="tiny", device="cpu"))
    event = gr.EventData(None, data)
    assert "give a number from 0 to 1" in page.clicked(str(PICTURE), "tiny", OWN_METHOD, event)["message"]


def test_what_fails_inside_is_not_shown(address, upload, monkeypatch):
    def fail(*given: Any, **options: Any) -> None:
        raise RuntimeError(f"cannot open {ROOT}/secret.bin")

    monkeypatch.setattr("spar_hf.demo.engine.own_label_map", fail)
    text = call(address, "segment", [file_data(upload), WORDS, "tiny", OWN_METHOD, 0, []])
    assert handlers.FAILED in text and "secret" not in text
    page = handlers.Page(Settings(model="tiny", device="cpu"))
    shown = page.segment(str(PICTURE), WORDS, "tiny", OWN_METHOD)
    assert shown[0] == {"message": handlers.FAILED}


def test_the_configuration_of_the_page_names_no_place_of_the_server(address):
    assert not shows_the_server(httpx.get(f"{address}/config").text)


# --- foreign pages -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("headers", [{}, {"Host": "evil.example"}, {"Host": "x@y:z"}])
@pytest.mark.parametrize("origin", [STRANGER, "null", "http://localhost:1"])
def test_no_foreign_page_gets_cors(address, headers, origin):
    headers = {**headers, "Origin": origin}
    answers = [
        httpx.get(f"{address}/config", headers=headers),
        httpx.get(address, headers=headers),
        httpx.post(f"{address}/gradio_api/call/segment", headers=headers, json={"data": []}),
        httpx.options(f"{address}/config", headers={**headers, "Access-Control-Request-Method": "POST"}),
    ]
    for answer in answers:
        assert not [name for name in answer.headers if name.startswith("access-control")], answer.headers


def test_a_page_of_this_machine_is_called_by_its_own_names(address):
    port = address.rpartition(":")[2]
    for host in (f"localhost:{port}", "127.0.0.1", f"[::1]:{port}", "LOCALHOST"):
        assert httpx.get(f"{address}/config", headers={"Host": host}).status_code == 200
    for host in ("evil.example", f"evil.example:{port}", "127.0.0.1.evil.example", ""):
        answer = httpx.get(f"{address}/config", headers={"Host": host})
        assert answer.status_code == 403 and "call it 127.0.0.1" in answer.text


def test_another_page_starts_no_work(address):
    for site, status in (("cross-site", 403), ("same-site", 403), ("same-origin", 200), ("none", 200)):
        headers = {"Sec-Fetch-Site": site}
        answer = httpx.post(f"{address}/gradio_api/call/segment", headers=headers, json={"data": []})
        assert answer.status_code == status
    assert httpx.get(address, headers={"Sec-Fetch-Site": "cross-site"}).status_code == 200  # a link leads here


# --- the guard alone ---------------------------------------------------------------------------------------------


def through(
    guarded: Guard, path: str, chunks: list[bytes], headers: dict[str, str] | None = None
) -> tuple[int, bytes]:
    """Status and body of a POST whose body comes in these chunks; an empty last one never comes."""
    sent: list[dict[str, Any]] = []
    coming = [
        {"type": "http.request", "body": chunk, "more_body": n < len(chunks)} for n, chunk in enumerate(chunks, 1)
    ]

    async def receive() -> dict[str, Any]:
        if not coming or coming[0]["body"] == b"":
            await asyncio.sleep(60)
        return coming.pop(0)

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    given = [(name.encode(), value.encode()) for name, value in (headers or {}).items()]
    scope = {"type": "http", "method": "POST", "path": path, "headers": [(b"host", b"localhost"), *given]}
    asyncio.run(guarded(scope, receive, send))
    return sent[0]["status"], sent[1]["body"]


async def echo(scope: dict[str, Any], receive: Any, send: Any) -> None:
    """Answers with the length of the body."""
    size, more = 0, True
    while more:
        message = await receive()
        size, more = size + len(message["body"]), message["more_body"]
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": str(size).encode()})


def test_bodies_have_limits(monkeypatch):
    monkeypatch.setattr(guard, "MAX_REQUEST_BYTES", 1000)
    monkeypatch.setattr(guard, "FORM_BYTES", 100)
    guarded = Guard(echo, max_upload_bytes=5000)
    assert through(guarded, "/gradio_api/queue/join", [b"a" * 500] * 2) == (200, b"1000")
    assert through(guarded, "/gradio_api/upload", [b"a" * 1000] * 5) == (200, b"5000")
    for path, chunks, headers in (
        ("/gradio_api/queue/join", [b"a" * 500] * 3, {}),
        ("/gradio_api/upload", [b"a" * 1000] * 6, {}),
        ("/gradio_api/queue/join", [b"a"], {"content-length": "1001"}),
        ("/gradio_api/queue/join", [b"a"], {"content-length": "-1"}),
    ):
        status, body = through(guarded, path, chunks, headers)
        assert status == 413 and b"too large; at most" in body


def test_a_body_that_stops_coming_is_given_up(monkeypatch):
    monkeypatch.setattr(guard, "IDLE_S", 0.05)
    status, body = through(Guard(echo, 5000), "/gradio_api/upload", [b"a", b""])
    assert status == 408 and body == b"The request stopped coming. Send it again."


def test_hosts_are_checked_only_where_they_are_known():
    assert through(Guard(echo, 10), "/x", [b"a"])[0] == 200
    assert through(Guard(echo, 10, ["localhost"]), "/x", [b"a"])[0] == 200
    assert through(Guard(echo, 10, ["page.example"]), "/x", [b"a"])[0] == 403
