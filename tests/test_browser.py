"""The page in a real browser: Debian's Chromium, driven by Playwright. Pictures of it go to test-output/.

    apt-get install chromium && pytest -m browser

Skipped where there is no Chromium. SPAR_CHROMIUM names another binary.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytestmark = pytest.mark.browser
pytest.importorskip("gradio")
sync_api = pytest.importorskip("playwright.sync_api")

from spar_hf.checkpoints import ASSETS  # noqa: E402
from spar_hf.demo.app import build, serve  # noqa: E402
from spar_hf.demo.settings import Settings  # noqa: E402

CHROMIUM = os.environ.get("SPAR_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
]
SHOTS = Path(__file__).parents[1] / "test-output"
WAIT_MS = 120_000
PICTURES = ASSETS / "pictures"
WORDS = "cake; car, automobile; tree; apple; star; sea; sky; sand"
Page = sync_api.Page


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """The app on loopback."""
    demo = build(Settings(max_file_mb=2, max_labels=40))
    yield serve(demo, block=False)
    demo.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[sync_api.Browser]:
    if CHROMIUM is None:
        pytest.skip("there is no Chromium here; apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield opened
        opened.close()


@pytest.fixture
def visit(browser, address) -> Iterator[Callable[..., Page]]:
    """`visit(width, height, dark)`: the page in a fresh window; at the end, that nothing came from elsewhere."""
    contexts, foreign, errors = [], [], []

    def open_page(width: int = 1440, height: int = 1000, dark: bool = False) -> Page:
        scheme = "dark" if dark else "light"
        context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(WAIT_MS)
        page.on("request", lambda request: foreign.append(request.url) if _is_foreign(request.url, address) else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(f"{address}?__theme={scheme}")
        page.locator("#answer .hint h3").wait_for()
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not foreign and not errors


def _is_foreign(url: str, address: str) -> bool:
    return not url.startswith((address, "data:", "blob:"))


def shot(page: Page, name: str) -> None:
    SHOTS.mkdir(exist_ok=True)
    page.screenshot(path=SHOTS / f"{name}.png", full_page=True)


def upload(page: Page, path: Path) -> None:
    """Puts a file into the picture's input, in place of the one there."""
    if page.get_by_label("Clear").count():
        page.get_by_label("Clear").first.click()
    page.locator("#picture input[type=file]").first.set_input_files(str(path))


def ask(page: Page, path: Path, words: str) -> None:
    upload(page, path)
    page.locator("#words textarea").fill(words)
    page.locator("#picture img").first.wait_for()
    page.locator("#run").click()


def segmented(page: Page, viewer: str = "#answer", panels: int = 1) -> None:
    page.wait_for_function(
        "([viewer, panels]) => document.querySelectorAll(viewer + ' canvas[data-active]').length === panels",
        arg=[viewer, panels],
    )


def pixels(page: Page, viewer: str = "#answer", panel: int = 0) -> np.ndarray:
    """(H, W, 3) of a panel's canvas."""
    found = page.evaluate(
        "([viewer, panel]) => { const c = document.querySelectorAll(viewer + ' canvas')[panel];"
        " const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;"
        " let s = ''; for (let i = 0; i < d.length; i += 4) s += String.fromCharCode(d[i], d[i + 1], d[i + 2]);"
        " return [c.height, c.width, btoa(s)]; }",
        [viewer, panel],
    )
    import base64

    height, width, text = found
    return np.frombuffer(base64.b64decode(text), np.uint8).reshape(height, width, 3).astype(int)


def test_empty_page_teaches(visit):
    page = visit()
    page.get_by_text("Drop a picture, paste one, take one, or choose an example.").wait_for()
    shot(page, "empty")
    page.locator("#run").click()
    page.locator("#answer [role=alert]", has_text="There are no words yet.").wait_for()
    page.get_by_role("tab", name="Compare").click()
    page.get_by_text("One pass against hundreds").wait_for()


def test_segment_isolate_and_download(visit, tmp_path):
    page = visit()
    ask(page, PICTURES / "demo.png", WORDS)
    segmented(page)
    page.wait_for_timeout(500)
    shot(page, "segment")
    tinted = pixels(page)
    photo = Image.open(PICTURES / "demo.png").convert("RGB").resize(tinted.shape[1::-1])
    assert np.abs(tinted - np.asarray(photo, dtype=int)).mean() > 10

    legend = page.locator("#answer .legend button")
    names = [entry.strip() for entry in page.locator("#answer .legend .label").all_inner_texts()]
    assert set(names) <= {"cake", "car", "tree", "apple", "star", "sea", "sky", "sand"} and len(names) >= 4
    shares = [
        float(re.match(r"[<\d. ]+", text).group().strip("< "))
        for text in page.locator("#answer .area").all_inner_texts()
    ]
    assert shares == sorted(shares, reverse=True) and abs(sum(shares) - 100) < 1

    legend.first.click()
    page.mouse.move(5, 5)
    assert legend.first.get_attribute("aria-pressed") == "true"
    alone = pixels(page)
    grey = (alone.max(axis=2) - alone.min(axis=2) <= 2).mean()  # all but that class has lost its colour
    assert abs(grey - (1 - shares[0] / 100)) < 0.1 and np.abs(alone - tinted).mean() > 10
    shot(page, "isolated")
    page.get_by_role("button", name="Show all classes").click()
    page.mouse.move(5, 5)
    assert np.array_equal(pixels(page), tinted)

    page.locator("#answer input[type=range]").fill("0")
    assert np.abs(pixels(page) - np.asarray(photo, dtype=int)).mean() < 6  # JPEG on the way; the drawing is grainy
    with page.expect_download() as download:
        page.locator("#downloads").get_by_text("Label map").click()
    download.value.save_as(tmp_path / "map.png")
    label_map = Image.open(tmp_path / "map.png")
    assert label_map.size == Image.open(PICTURES / "demo.png").size and label_map.mode == "P"


def test_an_example_runs_at_once_and_other_words_change_the_picture(visit):
    page = visit()
    page.locator("#examples button").nth(1).click()
    segmented(page)
    before = pixels(page)
    assert "cup, mug" in page.locator("#words textarea").input_value()
    page.locator("#words textarea").fill("sky; grass, meadow")
    page.locator("#words textarea").press("Shift+Enter")
    page.wait_for_function("document.querySelectorAll('#answer .legend li').length === 2")
    assert np.abs(pixels(page) - before).mean() > 5
    upload(page, _text_file())  # after an example, too, a bad file is answered in words
    page.locator("#run").click()
    page.locator("#answer [role=alert]", has_text="is not an image that can be read").wait_for()


def _text_file() -> Path:
    path = SHOTS / "notes.png"
    SHOTS.mkdir(exist_ok=True)
    path.write_text("this is no picture\n" * 100)
    return path


def test_uncertain_pixels_lose_their_class(visit):
    page = visit()
    ask(page, PICTURES / "demo.png", WORDS)
    segmented(page)

    def untinted() -> float:
        photo = Image.open(PICTURES / "demo.png").convert("RGB")
        return (np.abs(pixels(page) - np.asarray(photo, dtype=int)).max(axis=2) < 24).mean()  # JPEG on the way

    before = untinted()
    page.locator("#threshold input[type=number]").fill("0.97")
    page.locator("#threshold input[type=number]").press("Tab")
    page.locator("#run").click()
    row = page.locator("#answer .legend button", has_text="no class")
    row.wait_for()
    page.wait_for_timeout(500)
    shot(page, "uncertain")
    fraction = float(row.locator(".area").inner_text().rstrip(" %")) / 100
    assert fraction > 0.05 and abs(untinted() - before - fraction) < 0.5 * fraction


def test_compare_shows_windows_and_times(visit):
    page = visit()
    page.get_by_role("tab", name="Compare").click()
    upload(page, PICTURES / "sandbox.png")
    page.locator("#picture img").first.wait_for()
    page.locator("#words textarea").fill("fish; kite; butterfly; rocket; sand; road")
    page.locator("#compare-run").click()
    page.locator("#comparison figure").nth(1).get_by_text(re.compile(r"\d+ windows · \d+")).wait_for()
    captions = page.locator("#comparison figcaption").all_inner_texts()
    assert len(captions) == 3 and "1 pass · " in captions[0]
    page.mouse.move(5, 5)
    page.wait_for_timeout(500)
    shot(page, "compare")
    single, teacher = pixels(page, "#comparison", 0), pixels(page, "#comparison", 1)
    assert single.shape == teacher.shape and np.abs(single - teacher).mean() > 1


def test_compare_can_be_stopped(visit):
    page = visit()
    page.get_by_role("tab", name="Compare").click()
    upload(page, PICTURES / "demo.png")
    page.locator("#picture img").first.wait_for()
    page.locator("#words textarea").fill("sky; sand; car")
    page.locator("#compare-run").click()
    page.locator("#comparison figure").nth(1).get_by_text("Sliding the window").wait_for()
    page.locator("#stop").click()
    page.locator("#comparison figure").nth(1).get_by_text(re.compile(r"stopped after \d+ of \d+")).wait_for()
    page.locator("#stop[disabled]").wait_for()


def test_features_answer_clicks_and_arrow_keys(visit):
    page = visit()
    upload(page, PICTURES / "demo.png")
    page.locator("#picture img").first.wait_for()
    page.get_by_role("tab", name="Features").click()
    page.locator("#look").click()
    heat = page.locator("#feature-view img").nth(1)
    heat.wait_for()
    first = heat.get_attribute("src")
    page.locator("#feature-view .frame").first.click(position={"x": 30, "y": 30})
    page.wait_for_function("old => document.querySelectorAll('#feature-view img')[1].src !== old", arg=first)
    second = heat.get_attribute("src")
    page.wait_for_timeout(500)
    shot(page, "features")
    page.locator("#feature-view .frame").first.focus()
    for _ in range(4):
        page.keyboard.press("ArrowDown")
    page.wait_for_function("old => document.querySelectorAll('#feature-view img')[1].src !== old", arg=second)
    assert page.evaluate("document.activeElement.className").startswith("frame")


def test_mistakes_are_told_in_words(visit, tmp_path):
    page = visit()
    ask(page, PICTURES / "demo.png", "car; ; sky")
    page.locator("#answer [role=alert]", has_text="empty").wait_for()
    shot(page, "error")
    page.locator("#words textarea").fill("; ".join(f"word {i}" for i in range(60)))
    page.locator("#run").click()
    page.locator("#answer [role=alert]", has_text="at most 40 are allowed").wait_for()
    big = tmp_path / "big.bmp"
    Image.new("RGB", (1200, 900)).save(big)
    upload(page, big)
    page.get_by_text(re.compile("exceeds|too large|maximum", re.IGNORECASE)).first.wait_for()


HOSTILE = [
    "<img src=x onerror=window.pwned=1>",
    "<script>window.pwned=1</script>",
    "{{7*7}}${7*7}",
    "שלום עולם",
    "x" * 1900,
]


def test_hostile_labels_are_text(visit):
    page = visit()
    ask(page, PICTURES / "demo.png", "; ".join(HOSTILE))
    segmented(page)
    page.wait_for_timeout(500)
    shown = page.locator("#answer .legend .label").all_inner_texts()
    assert shown and set(shown) <= set(HOSTILE)
    for button in page.locator("#answer .legend button").all():
        button.hover()
    assert page.evaluate("window.pwned") is None
    assert page.locator("#answer .legend img, #answer .legend script").count() == 0
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    shot(page, "hostile")
    page.locator("#words textarea").fill("sky; <b id=evil>x</b>; <b id=evil>x</b>")  # quoted in the message
    page.locator("#run").click()
    page.locator("#answer [role=alert]", has_text="<b id=evil>").wait_for()
    assert page.locator("#evil").count() == 0


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_narrow_screen(visit, dark):
    page = visit(390, 844, dark)
    ask(page, PICTURES / "demo.png", WORDS)
    segmented(page)
    page.wait_for_timeout(500)
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    box = page.locator("#answer canvas").bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= 390
    shot(page, f"narrow-{'dark' if dark else 'light'}")
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    brightness = np.mean([int(value) for value in re.findall(r"\d+", background)[:3]])
    assert brightness < 80 if dark else brightness > 200


def test_dark_wide(visit):
    page = visit(1440, 1000, True)
    ask(page, PICTURES / "night-road.png", "car, automobile; moon; star; road; sky; grass; house; tree")
    segmented(page)
    page.wait_for_timeout(500)
    shot(page, "dark")


def test_keyboard_reaches_everything(visit):
    page = visit()
    ask(page, PICTURES / "demo.png", WORDS)
    segmented(page)
    page.locator("#run").focus()
    reached = []
    for _ in range(20):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.className + ' ' + document.activeElement.tagName"))
        if page.evaluate("document.activeElement.closest('.legend') !== null"):
            break
    assert any("INPUT" in name for name in reached)  # the opacity
    page.keyboard.press("Enter")
    assert page.locator("#answer .legend button[aria-pressed=true]").count() == 1
    page.keyboard.press("Escape")
    assert page.locator("#answer .legend button[aria-pressed=true]").count() == 0


def test_the_page_does_not_jump_while_it_works(visit):
    page = visit()
    before = page.locator("#answer").bounding_box()
    ask(page, PICTURES / "demo.png", WORDS)
    during = page.locator("#answer").bounding_box()
    segmented(page)
    after = page.locator("#answer").bounding_box()
    assert before["y"] == during["y"] == after["y"] and before["x"] == during["x"] == after["x"]
    assert during["height"] >= before["height"] - 1
