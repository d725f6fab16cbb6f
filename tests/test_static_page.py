"""`spaces/browser`: its modules in Node against the package, and the built page in a real Chromium.

    make browser && SPAR_PAGE=dist/browser pytest -m browser tests/test_static_page.py

Without SPAR_PAGE the page is built first. Skipped where there is no npm or no Chromium.
"""

from __future__ import annotations

import base64
import io
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytestmark = pytest.mark.browser
pytest.importorskip("onnxruntime")
sync_api = pytest.importorskip("playwright.sync_api")

import spar_onnx  # noqa: E402
from spar_onnx.folder import file_digest  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
PICTURES = ROOT / "src" / "spar_hf" / "assets" / "pictures"
SHOTS = ROOT / "test-output"
CHROMIUM = os.environ.get("SPAR_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = [
    "--no-sandbox",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--use-fake-device-for-media-stream",
    "--use-fake-ui-for-media-stream",
]
WAIT_MS = 120_000
WORDS = "cake; car, automobile; tree; apple; star; sea; sky; sand"
EXAMPLES = {
    "demo.png": WORDS,
    "five-things.png": "cup, mug; flower; tree; clock; star; brick; snow; sea; sky",
    "night-road.png": "boat; turtle; fish; moon; road; snow",
    "sandbox.png": "fish; kite; butterfly; rocket; sand; road",
}
EQUAL = 0.999  # share of the pixels whose class must be Python's


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The built page, with tiny."""
    if given := os.environ.get("SPAR_PAGE"):
        return Path(given).resolve()
    if shutil.which("npm") is None:
        pytest.skip("there is no npm here to build the page with; apt-get install nodejs npm")
    output = tmp_path_factory.mktemp("page") / "site"
    subprocess.run([sys.executable, ROOT / "spaces/browser/build.py", "--output", output], check=True, cwd=ROOT)
    return output


@pytest.fixture(scope="module")
def exported(site) -> Path:
    return site / "models" / "tiny"


@pytest.fixture(scope="module")
def pipeline(exported) -> Any:
    return spar_onnx.load(exported, threads=1)


# --- modules of the page, in Node ------------------------------------------------------------------------------


@pytest.fixture
def node(site) -> Callable[..., Any]:
    """`node(script, data)`: what a script returns, as JSON; `data` is there, and so are the page's modules."""
    if shutil.which("node") is None:
        pytest.skip("there is no Node.js here; apt-get install nodejs")

    def run(script: str, data: Any) -> Any:
        wrapped = (
            "import { readFileSync } from 'node:fs';\n"
            "const data = JSON.parse(readFileSync(0));\n"
            "const bytes = (text) => new Uint8ClampedArray(Buffer.from(text, 'base64'));\n"
            f"const text = (array) => Buffer.from(array.buffer).toString('base64');\n{script}"
        )
        command = ["node", "--input-type=module", "-e", wrapped]
        done = subprocess.run(command, input=json.dumps(data), capture_output=True, text=True, cwd=site)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


def packed(array: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()


def unpacked(text: str, dtype: Any) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), dtype)


SIZES = (((40, 57), (40, 57)), ((40, 57), (80, 31)), ((97, 61), (13, 200)), ((64, 48), (17, 13)), ((5, 300), (9, 1)))


def test_resizing_is_pillows_bit_by_bit(node):
    generator = np.random.default_rng(0)
    cases = []
    for resample in range(6):
        for given, wanted in SIZES:
            noise = generator.integers(0, 256, (*given, 3), dtype=np.uint8)
            if resample % 2:
                noise = np.where(noise > 127, 255, 0).astype(np.uint8)  # overshoots, which must be cut at 0 and 255
            cases.append((noise, given, wanted, resample))
    script = """
        const { resize } = await import('./resample.js');
        console.log(JSON.stringify(data.map(([rgb, from, to, filter]) => text(resize(bytes(rgb), from, to, filter)))));
    """
    found = node(script, [(packed(rgb), *rest) for rgb, *rest in cases])
    for text, (rgb, _, wanted, resample) in zip(found, cases, strict=True):
        expected = np.asarray(Image.fromarray(rgb).resize(wanted[::-1], Image.Resampling(resample)))
        assert np.array_equal(unpacked(text, np.uint8).reshape(expected.shape), expected), (wanted, resample)


RULES = ({"shortest_edge": 50}, {"longest_edge": 50}, {"max_pixels": 3000}, {"max_pixels": 10**9}, None)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_input_values_are_pythons_bit_by_bit(node, exported, rule):
    stored = json.loads((exported / "processor_config.json").read_text())["image_processor"] | {"size": rule}
    from spar_hf.input_pixels_spar import InputPixels

    pixels = InputPixels(**{name: stored[name] for name in InputPixels.__dataclass_fields__})
    script = """
        const { inputValues } = await import('./pixels.js');
        const { values, height, width } = inputValues(data.stored, { ...data, rgb: bytes(data.rgb) }, 1e9);
        console.log(JSON.stringify([text(values), height, width]));
    """
    for size_hw in ((64, 91), (130, 70), (3, 40)):
        rgb = np.random.default_rng(1).integers(0, 256, (*size_hw, 3), dtype=np.uint8)
        expected = pixels.values(Image.fromarray(rgb))
        data = {"stored": stored, "rgb": packed(rgb), "height": size_hw[0], "width": size_hw[1]}
        text, height, width = node(script, data)
        assert (3, height, width) == expected.shape
        assert np.array_equal(unpacked(text, np.float32).reshape(expected.shape), expected)


TEXTS = (
    "a photo of a cat.",
    "Ünïcode, it's 3 words! don't\tyou  see",
    "word " * 200,
    "naïve café ﬁsh ①②",
    "日本語の字 и кириллица שלום",
    "🙂🙃 <|endoftext|> x<|startoftext|>y",
    "  _under_score- (paren) [x] 100% a/b\\c ",
    "",
)


@pytest.mark.parametrize("change", ({}, {"fills": True}, {"strip_punctuation": True, "lowercase": True}), ids=str)
def test_token_ids_are_those_of_tokenizers(node, exported, change):
    from spar_onnx.words import TextSide, WordReader

    side = json.loads((exported / "export.json").read_text())["text"] | change
    expected = WordReader(exported / "tokenizer.json", TextSide(**side))(TEXTS)
    script = """
        const { WordReader } = await import('./tokens.js');
        const reader = new WordReader(data.tokenizer, data.config, data.side);
        const { ids, dims } = reader.batch(data.texts);
        console.log(JSON.stringify([[...ids].map(Number), dims]));
    """
    files = {name: json.loads((exported / f"{name}.json").read_text()) for name in ("tokenizer", "tokenizer_config")}
    data = {"tokenizer": files["tokenizer"], "config": files["tokenizer_config"], "side": side, "texts": TEXTS}
    ids, dims = node(script, data)
    assert np.array_equal(np.array(ids).reshape(dims), expected)


TYPED = (
    WORDS,
    "road\ncar, automobile;\r\n sky ;",
    ";; sky ;;",
    "one",
    "a  b ,\tc",
    "",
    " ; ",
    "car; ; sky",
    "car,,bus",
    "Sky; sky",
    "straße; STRASSE",
    "car, Car",
    "x" * 2001,
    "; ".join(f"word {i}" for i in range(301)),
    "a, b" * 30_000,
)


def test_words_are_read_as_the_other_page_reads_them(node):
    from spar_hf.demo.engine import Engine
    from spar_hf.demo.pictures import DemoError
    from spar_hf.demo.settings import Settings

    engine = Engine(Settings())
    script = """
        const { parseWords } = await import('./words.js');
        const read = (words) => { try { return parseWords(words); } catch (error) { return error.message; } };
        console.log(JSON.stringify(data.map(read)));
    """
    for typed, found in zip(TYPED, node(script, TYPED), strict=True):
        try:
            expected: Any = [list(names) for names in engine.read_labels(typed).classes]
        except DemoError as error:
            assert isinstance(found, str) and found[:8].lower() == str(error)[:8].lower(), (typed[:40], found, error)
        else:
            assert found == expected


def test_features_as_pictures_are_the_packages(node, site):
    import torch

    from spar_hf.demo.payload import heat
    from spar_hf.grid_spar import upsample
    from spar_hf.visualize import pca_picture

    generator = torch.Generator().manual_seed(0)
    spread = torch.linspace(3, 0.3, 24)
    rows = torch.nn.functional.normalize(torch.randn(7, 9, 24, generator=generator) * spread + 1, dim=-1)
    size, image, covered = (101, 157), (118, 150), (118 / 112, 150 / 144)
    shown = np.random.default_rng(2).integers(0, 256, (*size, 3), dtype=np.uint8)
    script = """
        const { coverageOf, heatPicture, pcaPicture, similarity } = await import('./features.js');
        const { default: constants } = await import('./constants.js');
        const rest = [[7, 9], 24, data.size];
        const covered = coverageOf(data.image, { patch_px: 16, size_rule: 'floor' });
        const own = new Float32Array(bytes(data.rows).buffer);
        const cosines = similarity(own, ...rest, covered, { x: 0.4, y: 0.99 });
        const heat = heatPicture(bytes(data.shown), cosines, constants.heat);
        const pca = pcaPicture(own, ...rest, covered);
        console.log(JSON.stringify([covered, text(pca), text(cosines), text(heat.pixels)]));
    """
    rgba = np.concatenate([shown, np.full((*size, 1), 255, np.uint8)], axis=2)
    data = {"rows": packed(rows.numpy()), "size": size, "image": image, "shown": packed(rgba)}
    found, pca, cosines, heated = node(script, data)
    np.testing.assert_allclose(found, covered)
    expected = np.asarray(pca_picture(rows, size, covered)).astype(int)
    assert np.abs(unpacked(pca, np.uint8).reshape(*size, 4)[..., :3] - expected).max() <= 1
    row, column = min(int(0.99 * covered[0] * 7), 6), int(0.4 * covered[1] * 9)
    similar = upsample(rows @ rows[row, column], size, covered).numpy()
    np.testing.assert_allclose(unpacked(cosines, np.float32).reshape(size), similar, atol=1e-6)
    warm = np.asarray(heat(Image.fromarray(shown), similar)).astype(int)
    assert np.abs(unpacked(heated, np.uint8).reshape(*size, 4)[..., :3] - warm).max() <= 2


@pytest.mark.parametrize("highest", [3, 254, 255, 299])
def test_label_map_png_is_the_packages(node, highest):
    from spar_hf.visualize import label_map_image

    ids = np.random.default_rng(3).integers(-1, highest + 1, (31, 17)).astype(np.int16)
    ids[0, 0] = highest
    script = """
        const { labelMapPng } = await import('./png.js');
        const { default: constants } = await import('./constants.js');
        const png = await labelMapPng(new Int16Array(bytes(data).buffer), 31, 17, constants.palette);
        console.log(JSON.stringify(text(new Uint8Array(await png.arrayBuffer()))));
    """
    found = Image.open(io.BytesIO(base64.b64decode(node(script, packed(ids)))))
    expected = label_map_image(ids)
    assert found.mode == expected.mode and np.array_equal(np.asarray(found), np.asarray(expected))
    if found.mode == "P":
        assert found.getpalette()[: 3 * highest] == expected.getpalette()[: 3 * highest]


# --- the page, in Chromium -------------------------------------------------------------------------------------


class Quiet(SimpleHTTPRequestHandler):
    """A plain server of files, without any of the headers that threads need; other pages may read from it."""

    def end_headers(self) -> None:
        self.send_header("Access-Control-Allow-Origin", "*")
        super().end_headers()

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def serve() -> Iterator[Callable[[Path], str]]:
    """`serve(folder)`: an address on loopback."""
    servers = []

    def start(folder: Path) -> str:
        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_address[1]}/"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def address(site, serve) -> str:
    return serve(site)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("there is no Chromium here; apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def visit(browser, address) -> Iterator[Callable[..., Any]]:
    """`visit(width, height, dark)`: the page, its model loaded. At the end: nothing left loopback, nothing failed."""
    contexts, foreign, errors = [], [], []

    def open_page(width: int = 1440, height: int = 1000, dark: bool = False) -> Any:
        context = browser.new_context(
            viewport={"width": width, "height": height}, color_scheme="dark" if dark else "light"
        )
        contexts.append(context)
        context.set_default_timeout(WAIT_MS)
        context.grant_permissions(["camera"], origin=address.rstrip("/"))
        # All requests of the context: those of the page, of its workers and of the service worker.
        context.on("request", lambda request: foreign.append(request.url) if _is_foreign(request.url) else None)
        page = context.new_page()
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(address)
        ready(page)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not foreign and not errors


def _is_foreign(url: str) -> bool:
    return not url.startswith(("http://127.0.0.1:", "data:", "blob:"))


def until(page: Any, expression: str, arg: Any = None) -> None:
    """Waits until an expression holds; Playwright's own waiting runs words as code, which the page forbids."""
    end = time.monotonic() + WAIT_MS / 1000
    while time.monotonic() < end:
        try:
            if page.evaluate(expression, arg):
                return
        except sync_api.Error:  # the page is being loaded anew
            pass
        page.wait_for_timeout(50)
    raise TimeoutError(f"{expression} does not hold; the page says {page.locator('#work').inner_text()!r}")


def ready(page: Any) -> None:
    until(page, "document.getElementById('status').textContent.includes('works offline')")
    idle(page)


def idle(page: Any) -> None:
    until(page, "document.getElementById('work').dataset.state === 'idle'")


def shot(page: Any, name: str) -> None:
    SHOTS.mkdir(exist_ok=True)
    page.mouse.move(2, 2)
    page.screenshot(path=SHOTS / f"static-{name}.png", full_page=True)


def choose(page: Any, picture: Path) -> None:
    page.locator("#file").set_input_files(str(picture))


def segment(page: Any, picture: Path, words: str) -> None:
    choose(page, picture)
    page.locator("#words").fill(words)
    page.locator("#run").click()
    idle(page)
    page.locator("#answer canvas[data-active]").wait_for()


def label_map(page: Any, tmp_path: Path) -> np.ndarray:
    """(H, W) class ids of the label map that the page gives away, -1 for no class."""
    with page.expect_download() as download:
        page.locator("#save-map").click()
    download.value.save_as(tmp_path / "map.png")
    ids = np.asarray(Image.open(tmp_path / "map.png")).astype(int)
    return np.where(ids == 255, -1, ids)


def alert(page: Any, text: str, viewer: str = "#answer") -> str:
    found = page.locator(f"{viewer} [role=alert]", has_text=text)
    found.wait_for()
    line = found.inner_text()
    assert "\n" not in line
    return line


@pytest.fixture(scope="module")
def page(visit) -> Any:
    """One page for the tests that leave it as they find it; what is under *Model* can be reached."""
    opened = visit()
    opened.locator("#model").evaluate("one => { one.open = true; }")
    return opened


def test_the_page_is_isolated_and_has_threads(page):
    assert page.evaluate("crossOriginIsolated")  # though the server sends no such header
    status = page.locator("#status").inner_text()
    assert re.search(r"tiny · float32 · (WebGPU|WebAssembly, \d+ threads?) · works offline", status), status
    if "WebAssembly" in status and (os.cpu_count() or 1) > 1:
        assert "1 thread " not in status


@pytest.mark.parametrize("name", EXAMPLES)
def test_label_maps_are_pythons(page, pipeline, tmp_path, name):
    segment(page, PICTURES / name, EXAMPLES[name])
    found = label_map(page, tmp_path)
    expected = pipeline(PICTURES / name, EXAMPLES[name])["segmentation"]
    assert found.shape == expected.shape and (found == expected).mean() >= EQUAL


def test_label_maps_are_pytorchs(page, tmp_path):
    import spar_hf

    model, processor = spar_hf.load("tiny")
    own = spar_hf.OpenVocabularySegmentationPipeline(model=model, processor=processor)
    segment(page, PICTURES / "demo.png", WORDS)
    expected = np.asarray(own(str(PICTURES / "demo.png"), candidate_labels=WORDS)["segmentation"])
    assert (label_map(page, tmp_path) == expected).mean() >= EQUAL


def odd_pictures(folder: Path) -> dict[str, Path]:
    """A photo that lies on its side, a picture with transparency, and one of an odd size."""
    drawing = Image.open(PICTURES / "sandbox.png").convert("RGB")
    exif = Image.Exif()
    exif[274] = 6
    drawing.save(folder / "turned.jpg", quality=92, exif=exif)
    faded = drawing.convert("RGBA")
    faded.putalpha(Image.linear_gradient("L").resize(drawing.size))
    faded.save(folder / "faded.png")
    drawing.crop((3, 5, 624, 338)).save(folder / "odd.webp", lossless=True)
    drawing.convert("L").save(folder / "grey.png")
    return {path.stem: path for path in sorted(folder.iterdir())}


def test_odd_pictures_thresholds_and_sizes(page, pipeline, tmp_path):
    words = EXAMPLES["sandbox.png"]
    pictures = odd_pictures(tmp_path)
    for stem in ("turned", "faded", "odd", "grey"):
        segment(page, pictures[stem], words)
        expected = pipeline(pictures[stem], words)["segmentation"]
        found = label_map(page, tmp_path)
        assert found.shape == expected.shape and (found == expected).mean() >= EQUAL, stem

    page.locator("#size").select_option("250000")  # now resized for the network
    segment(page, PICTURES / "sandbox.png", words)
    expected = pipeline(PICTURES / "sandbox.png", words, size={"max_pixels": 250_000})["segmentation"]
    assert (label_map(page, tmp_path) == expected).mean() >= EQUAL
    page.locator("#size").select_option("1000000")

    page.locator("#threshold").fill("0.6")
    page.locator("#run").click()
    idle(page)
    for typed in (words, "kite"):  # a single class competes with everyday words
        segment(page, PICTURES / "sandbox.png", typed)
        expected = pipeline(PICTURES / "sandbox.png", typed, background_threshold=0.6)["segmentation"]
        found = label_map(page, tmp_path)
        assert (expected == -1).mean() > 0.01 and (found == expected).mean() >= EQUAL
        page.locator("#answer .legend", has_text="no class").wait_for()
    page.locator("#threshold").fill("0")


def test_legend_hover_opacity_and_the_other_downloads(page, tmp_path):
    segment(page, PICTURES / "demo.png", WORDS)
    shot(page, "segment")

    def drawn() -> np.ndarray:
        script = """() => { const c = document.querySelector('#answer canvas');
            const { data } = c.getContext('2d').getImageData(0, 0, c.width, c.height);
            return [...data.filter((_, i) => i % 397 < 3)]; }"""
        return np.array(page.evaluate(script))

    tinted, legend = drawn(), page.locator("#answer .legend button")
    assert legend.count() >= 4
    legend.first.hover()
    alone = drawn()
    assert np.abs(alone - tinted).mean() > 5
    page.locator("#answer canvas").hover(position={"x": 200, "y": 60})
    assert page.locator("#answer .name.on").inner_text() in [part.split(",")[0].strip() for part in WORDS.split(";")]
    page.mouse.move(2, 2)
    page.locator("#answer .opacity input").fill("0")
    assert np.abs(drawn() - tinted).mean() > 5
    page.locator("#answer .opacity input").fill("60")
    assert np.array_equal(drawn(), tinted)

    files = {}
    for button in ("overlay", "classes"):
        with page.expect_download() as download:
            page.locator(f"#save-{button}").click()
        files[button] = tmp_path / download.value.suggested_filename
        download.value.save_as(files[button])
    facts = json.loads(files["classes"].read_text("utf-8"))
    assert [entry["label"] for entry in facts["classes"]] == [part.split(",")[0].strip() for part in WORDS.split(";")]
    assert facts["size_hw"] == [512, 768] and abs(sum(entry["area_fraction"] for entry in facts["classes"]) - 1) < 1e-6
    overlay = Image.open(files["overlay"])
    assert overlay.width == 768 and overlay.height > 512


def test_features_answer_clicks_and_arrow_keys(page):
    choose(page, PICTURES / "demo.png")
    page.locator("#tab-features").click()
    page.locator("#look").click()
    heat = page.locator("#feature-view img").nth(1)
    heat.wait_for()
    first = heat.get_attribute("src")
    page.locator("#feature-view .frame").first.click(position={"x": 30, "y": 30})
    changed = "old => document.querySelectorAll('#feature-view img')[1].src !== old"
    until(page, changed, arg=first)
    idle(page)
    shot(page, "features")
    second = heat.get_attribute("src")
    page.locator("#feature-view .frame").first.focus()
    page.keyboard.press("ArrowDown")
    until(page, changed, arg=second)
    idle(page)
    note = page.locator("#feature-view .note").inner_text()
    assert re.search(
        r"48 × 32 patches of 128 numbers, from tiny in one pass. Cosine: -?\d.\d\d to (0.9\d|1.00)", note
    ), note
    page.locator("#tab-features").press("ArrowLeft")
    assert page.locator("#answer").is_visible() and not page.locator("#feature-view").is_visible()


def test_paste_drop_camera_and_examples(page):
    image = "document.querySelector('#picture img').src"
    content = base64.b64encode((PICTURES / "night-road.png").read_bytes()).decode()
    give = """([kind, content]) => {
        const data = new DataTransfer();
        const bytes = Uint8Array.from(atob(content), (c) => c.charCodeAt(0));
        data.items.add(new File([bytes], 'x.png', { type: 'image/png' }));
        const options = { bubbles: true, cancelable: true, clipboardData: data, dataTransfer: data };
        const event = kind === 'paste' ? new ClipboardEvent(kind, options) : new DragEvent(kind, options);
        document.body.dispatchEvent(event);
    }"""
    for kind in ("paste", "drop"):
        before = page.evaluate(image)
        page.evaluate(give, [kind, content])
        until(page, f"old => {image} !== old", arg=before)
    page.locator("#camera").click()
    page.locator("#camera", has_text="Take the picture").click()
    until(page, "document.getElementById('camera').textContent === 'Camera'")
    page.locator("#words").fill("green; yellow")
    page.locator("#words").press("Shift+Enter")
    idle(page)
    page.locator("#answer canvas[data-active]").wait_for()
    page.locator("#examples button").nth(2).click()
    until(page, "document.getElementById('words').value.startsWith('boat')")
    idle(page)
    page.locator("#answer .legend .label", has_text="moon").wait_for()
    page.locator("#vocabulary").select_option(index=1)
    assert page.locator("#words").input_value().count(";") > 10


def test_mistakes_are_told_in_one_line(page, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes((PICTURES / "demo.png").read_bytes()[:3000])
    notes = tmp_path / "notes.png"
    notes.write_text("this is no picture\n" * 100)
    for path in (notes, broken):
        choose(page, path)
        page.locator("#words").fill("sky; sand")
        page.locator("#run").click()
        alert(
            page, f"“{path.name}” is no picture that this browser can read, or it is damaged; save it as PNG or JPEG."
        )
    choose(page, PICTURES / "demo.png")
    for typed, told in (
        ("", "There are no words yet. Type what you look for, such as: road; car, automobile; sky"),
        ("car; ; sky", "every label needs a name. Remove it or name it."),
        ("<b id=evil>x</b>; <b id=evil>x</b>", "a name belongs to one class. Remove one of them."),
    ):
        page.locator("#words").fill(typed)
        page.locator("#run").click()
        alert(page, told)
    assert page.locator("#evil").count() == 0


def load_address(page: Any, address: str) -> None:
    page.locator("#address").fill(address)
    page.locator("#load").click()


def spoiled(exported: Path, folder: Path, change: Callable[[Path, dict[str, Any]], None]) -> None:
    """A copy of an exported folder, changed; `change` gets the copy and its record."""
    shutil.copytree(exported, folder)
    record = json.loads((folder / "export.json").read_text())
    change(folder, record)
    (folder / "export.json").write_text(json.dumps(record))


def test_folders_that_are_none_are_refused_in_one_line(page, exported, serve, tmp_path):
    def cut(folder: Path, _: Any) -> None:
        (folder / "onnx/vision_model.onnx").write_bytes((folder / "onnx/vision_model.onnx").read_bytes()[:-9])

    def garbage(folder: Path, record: dict[str, Any]) -> None:
        path = folder / "onnx/text_model.onnx"
        path.write_bytes(b"no graph" * 100)
        record["files"]["onnx/text_model.onnx"] = file_digest(path)

    changes: dict[str, tuple[Callable[[Path, dict[str, Any]], None], str]] = {
        "other": (lambda _, record: record.update(layout=9, spar_hf="7.1"), "was exported by spar-hf 7.1 in layout 9"),
        "programs": (lambda _, record: record.update(format="torch-export"), "which PyTorch runs; give a folder of"),
        "lacks": (lambda _, record: record.pop("patch_px"), "export.json lacks patch_px; export the model again"),
        "cut": (cut, "vision_model.onnx is corrupt or of another export: its check sum differs; export the model"),
        "garbage": (garbage, "text_model.onnx cannot be run by onnxruntime-web"),
        "missing": (lambda folder, _: (folder / "tokenizer.json").unlink(), "tokenizer.json is missing"),
        "no-json": (lambda folder, _: (folder / "processor_config.json").write_text("{"), "cannot be read ("),
    }
    address = serve(tmp_path)
    for name, (change, told) in changes.items():
        spoiled(exported, tmp_path / name, change)
        load_address(page, f"{address}{name}")
        line = alert(page, told)
        assert name in line or "127.0.0.1" in line
    load_address(page, f"{address}nothing")
    alert(page, "is missing (the server says 404); check the address")
    load_address(page, "nonsense")
    alert(page, "“nonsense” is no address; give one such as https://example.org/exported/.")
    load_address(page, "http://127.0.0.1:9/")
    alert(page, "cannot be reached; check the address and the network.")
    page.locator("#shipped").click()
    ready(page)
    segment(page, PICTURES / "demo.png", WORDS)


def test_a_folder_by_address_and_from_disk(page, exported, serve, tmp_path):
    shutil.copytree(exported, tmp_path / "mine")
    load_address(page, f"{serve(tmp_path)}mine/")
    page.locator("#model-name", has_text="mine").wait_for()
    idle(page)
    shutil.rmtree(tmp_path / "mine")
    shutil.copytree(exported, tmp_path / "from-disk")
    page.locator("#folder").set_input_files(str(tmp_path / "from-disk"))
    page.locator("#model-name", has_text="from-disk").wait_for()
    idle(page)
    segment(page, PICTURES / "demo.png", WORDS)
    assert "from-disk, one pass" in page.locator("#answer figcaption").inner_text()
    page.locator("#shipped").click()
    ready(page)


def hungry_vision(path: Path, dim: int) -> None:
    """A tower of the same inputs and outputs that asks for (patches x 22)² numbers: gigabytes at 512 x 768."""
    import onnx
    from onnx import parser

    text = f"""
    <ir_version: 10, opset_import: ["" : 20]>
    vision (float[batch, 3, height, width] pixel_values) => (float[batch, rows, columns, dim] patch_embeds) {{
      axes = Constant<value_ints = [1]>()
      grey = ReduceMean<keepdims = 1>(pixel_values, axes)
      patches = AveragePool<kernel_shape = [16, 16], strides = [16, 16]>(grey)
      count = Size(patches)
      many = Constant<value_int = 22>()
      side = Mul(count, many)
      one = Constant<value_ints = [1]>()
      sides = Reshape(side, one)
      square = Concat<axis = 0>(sides, sides)
      zero = Constant<value_floats = [0.0]>()
      map = Expand(zero, square)
      most = ReduceMax<keepdims = 0>(map)
      fed = Add(patches, most)
      last = Transpose<perm = [0, 2, 3, 1]>(fed)
      wide = Constant<value_ints = [1, 1, 1, {dim}]>()
      patch_embeds = Tile(last, wide)
    }}
    """
    onnx.save(parser.parse_model(text), str(path))


def test_short_memory_is_told_and_a_smaller_size_offered(page, exported, tmp_path):
    pytest.importorskip("onnx")

    def hungry(folder: Path, record: dict[str, Any]) -> None:
        path = folder / "onnx/vision_model.onnx"
        hungry_vision(path, record["dim"])
        record["files"]["onnx/vision_model.onnx"] = file_digest(path)

    spoiled(exported, tmp_path / "hungry", hungry)
    page.locator("#folder").set_input_files(str(tmp_path / "hungry"))
    page.locator("#model-name", has_text="hungry").wait_for()
    idle(page)
    choose(page, PICTURES / "demo.png")
    page.locator("#words").fill(WORDS)
    page.locator("#run").click()
    alert(page, "Memory is short: a picture of 768 × 512 pixels does not fit.")
    shot(page, "memory")
    page.locator("#shrink", has_text="Try at 0.25 million pixels").click()  # the picture has 0.39 million
    page.locator("#answer canvas[data-active]").wait_for()  # 1.7 GB, which is there
    page.locator("#size").select_option("1000000")
    page.locator("#shipped").click()
    ready(page)


def test_cancel_stops_the_work_and_the_next_run_goes_on(page):
    choose(page, PICTURES / "five-things.png")
    page.locator("#words").fill("; ".join(f"thing {number}" for number in range(200)))  # 16 000 sentences
    page.locator("#run").click()
    until(page, "/of 16000 sentences/.test(document.getElementById('work-text').textContent)")
    shot(page, "working")
    page.locator("#cancel").click()
    idle(page)
    assert "Cancelled" in page.locator("#status").inner_text()
    segment(page, PICTURES / "five-things.png", EXAMPLES["five-things.png"])


def test_it_works_offline_after_the_first_load(visit, pipeline, tmp_path):
    page = visit()
    page.context.set_offline(True)
    page.reload()
    ready(page)
    page.locator("#examples button").nth(3).click()
    until(page, "document.getElementById('words').value.startsWith('fish')")
    idle(page)
    expected = pipeline(PICTURES / "sandbox.png", EXAMPLES["sandbox.png"])["segmentation"]
    assert (label_map(page, tmp_path) == expected).mean() >= EQUAL


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_narrow_and_dark(visit, dark):
    page = visit(390, 844, dark)
    segment(page, PICTURES / "demo.png", WORDS)
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    box = page.locator("#answer canvas").bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= 390
    shot(page, f"narrow-{'dark' if dark else 'light'}")
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    brightness = np.mean([int(value) for value in re.findall(r"\d+", background)[:3]])
    assert brightness < 80 if dark else brightness > 200
    page.set_viewport_size({"width": 1440, "height": 1000})
    shot(page, f"wide-{'dark' if dark else 'light'}")


def test_the_keyboard_reaches_everything(page):
    segment(page, PICTURES / "demo.png", WORDS)
    page.locator("#choose").focus()
    reached = set()
    for _ in range(40):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id || document.activeElement.closest('[id]')?.id"))
    wanted = {
        "camera",
        "words",
        "vocabulary",
        "model",
        "examples",
        "tab-segment",
        "run",
        "threshold",
        "answer",
        "save-map",
    }
    assert wanted <= reached, wanted - reached
