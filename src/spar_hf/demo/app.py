"""The page: `build()` lays it out, `serve()` runs it. All work is the engine's, all pictures are the viewers'."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import gradio as gr

from ..checkpoints import ASSETS
from ..evaluation import load_vocabulary
from ..methods.table import BENCHMARKS, METHODS
from ..picture_book.dataset import CLASSES as PICTURE_BOOK
from .engine import DemoError, Engine, Stopped
from .payload import Downloads, facts, feature_view, message, milliseconds, view
from .settings import Settings

PAGE = Path(__file__).parent / "page"
OWN_METHOD = "the model's own"
EXAMPLES = (
    ("demo.png", "cake; car, automobile; tree; apple; star; sea; sky; sand"),
    ("five-things.png", "cup, mug; flower; tree; clock; star; brick; snow; sea; sky"),
    ("night-road.png", "boat; turtle; fish; moon; road; snow"),
    ("sandbox.png", "fish; kite; butterfly; rocket; sand; road"),
)

SEGMENT_HINT = """<h3>Name it, see it</h3>
<ol><li>Drop a picture, paste one, take one, or choose an example.</li>
<li>Type what you look for. <code>;</code> splits classes, <code>,</code> splits names of one class:
<code>road; car, automobile; sky</code></li>
<li>Press <b>Segment</b>. Point at a class to see it alone; click to keep it.</li></ol>
<p>Every patch of the picture goes to the nearest of your words, so name the ground too.</p>"""
COMPARE_HINT = """<h3>One pass against hundreds</h3>
<ol><li><b>Single pass</b>: the network once over the whole picture, far larger than it was trained on.</li>
<li><b>Sliding window</b>: the same network on every window of its own size, averaged. Better, and slow.</li>
<li><b>Distilled student</b>: one pass again, after learning from the window.</li></ol>
<p>Same picture, same words, with the time of each.</p>"""
FEATURES_HINT = """<h3>What the network sees</h3>
<p>Each patch becomes one vector. Their three main directions are shown as red, green and blue: what has the same
colour is alike to the network.</p>
<p>Click a place, or move there with the arrow keys, to see which patches are similar to it.</p>"""

HEAD = """<h1>SPAR: name it, see it</h1>
<p>Open-vocabulary segmentation of any picture, at any size, in one forward pass.</p>"""
CSS = """
html { scrollbar-gutter: stable; }
.gradio-container { width: 100% !important; max-width: 1400px !important; margin: 0 auto !important; }
.gradio-container > main, .gradio-container main > .wrap { width: 100% !important; max-width: none !important; }
#head h1 { font-size: 1.6rem; margin: .2rem 0 0; }
#head p { margin: .2rem 0 .4rem; color: var(--body-text-color-subdued); }
#downloads button { min-width: 9rem; }
@media (max-width: 640px) { .gradio-container { padding: .5rem !important; } #head h1 { font-size: 1.3rem; } }
"""


def picture_input(**options: Any) -> gr.Image:
    """An image input that hands over the file as it came: the package opens it, under limits and with clear words."""
    component = gr.Image(type="filepath", image_mode=None, **options)
    # On the object, for Gradio writes a stub file beside the source of every class made from a component.
    component.preprocess = lambda payload: payload.path if payload is not None else None  # type: ignore[method-assign]
    return component


def viewer(name: str, hint: str, **options: Any) -> gr.HTML:
    """A component of our own from page/NAME.html, .css and .js; no value is ever part of its HTML."""
    html, css, js = ((PAGE / f"{name}.{kind}").read_text(encoding="utf-8") for kind in ("html", "css", "js"))
    return gr.HTML(value={}, html_template=html, css_template=css, js_on_load=js, hint=hint, **options)


@cache
def vocabularies() -> dict[str, str]:
    """The vocabularies of the menu, written as a visitor would."""
    found = {"Picture book": PICTURE_BOOK}
    found |= {name: load_vocabulary(name).classes for name in BENCHMARKS}
    return {name: "; ".join(", ".join(names) for names in classes) for name, classes in found.items()}


class Stops:
    """Which visitor has asked to stop, by session."""

    def __init__(self) -> None:
        self.running: dict[str, threading.Event] = {}

    def begin(self, request: gr.Request | None) -> tuple[str, threading.Event]:
        session = (request.session_hash if request else None) or "-"
        return session, self.running.setdefault(session, threading.Event())

    def ask(self, request: gr.Request) -> None:
        if event := self.running.get(request.session_hash or "-"):
            event.set()


class Page:
    """The handlers of one app: an engine, its downloads, and who has asked to stop."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.engine = Engine(settings)
        self.downloads = Downloads()
        self.stops = Stops()
        self.number = 0

    def segment(self, path: str | None, words: str, model: str, method: str) -> tuple[Any, ...]:
        """The viewer, and the three downloads."""
        try:
            answer = self.engine.segment(path, words, model, own(method))
        except DemoError as error:
            return message(str(error)), *(gr.update(value=None, interactive=False) for _ in range(3))
        rows, columns = answer.grid_hw
        note = f"{columns} × {rows} patches · {milliseconds(answer.encode_ms)}"
        shown = view([{"title": f"{model}, one pass", "note": note, "answer": answer}], [answer], self.next_key())
        return shown, *(gr.update(value=path, interactive=True) for path in self.downloads.write(answer))

    def compare(
        self,
        path: str | None,
        words: str,
        model: str,
        method: str,
        request: gr.Request,
        progress: gr.Progress = gr.Progress(),  # noqa: B008 (how Gradio knows where to put it)
    ) -> Iterator[dict[str, Any]]:
        """The viewer: first the single passes, then the window's answer too."""
        session, stop = self.stops.begin(request)
        try:
            yield from self._compare(path, words, model, method, stop, progress)
        except DemoError as error:
            yield message(str(error))
        finally:
            self.stops.running.pop(session, None)

    def _compare(
        self, path: str | None, words: str, model: str, method: str, stop: threading.Event, progress: gr.Progress
    ) -> Iterator[dict[str, Any]]:
        engine, key = self.engine, self.next_key()
        start = engine.teacher_of(model) or model
        student = model if start != model else engine.student_of(model)
        single = {"title": f"Single pass, {start}", "answer": self._timed(path, words, start, method)}
        answers = [single["answer"]]
        last: dict[str, Any] = {"title": "Distilled student", "note": "", "wait": f"No student of {start} ships yet."}
        if student is not None:
            last = {"title": f"Distilled student, {student}", "answer": self._timed(path, words, student, method)}
            answers.append(last["answer"])
        for panel in (single, last):
            if "answer" in panel:
                panel["note"] = f"1 pass · {milliseconds(panel['answer'].encode_ms)}"
        windows = engine.num_windows(path, start, own(method))
        waiting = {"title": "Sliding window", "note": f"{windows} windows", "wait": "Sliding the window…"}
        yield view([dict(single), waiting, dict(last)], answers, key)

        done = 0

        def watch(count: int) -> None:
            nonlocal done
            done += count
            progress((done, windows), desc="Sliding window", unit="windows")
            if stop.is_set():
                raise Stopped

        try:
            teacher = engine.segment(path, words, start, own(method), window=True, watch=watch)
        except Stopped:
            waiting = {**waiting, "note": f"stopped after {done} of {windows}", "wait": "Stopped."}
            yield view([dict(single), waiting, dict(last)], answers, key)
            return
        except DemoError as error:
            waiting = {**waiting, "wait": str(error)}
            yield view([dict(single), waiting, dict(last)], answers, key)
            return
        note = f"{teacher.windows} windows · {milliseconds(teacher.encode_ms)}"
        panels = [dict(single), {"title": f"Sliding window, {start}", "note": note, "answer": teacher}, dict(last)]
        yield view(panels, [answers[0], teacher, *answers[1:]], key)

    def _timed(self, path: str | None, words: str, model: str, method: str) -> Any:
        """The second of two equal passes: the first one of a size also pays for choosing kernels and memory."""
        self.engine.segment(path, words, model, own(method))
        return self.engine.segment(path, words, model, own(method))

    def features(self, path: str | None, model: str, method: str, x: float = 0.5, y: float = 0.5) -> dict[str, Any]:
        """The features' viewer."""
        try:
            features = self.engine.features(path, model, own(method))
            cosines, _ = self.engine.similarity(features, y, x)
        except DemoError as error:
            return message(str(error))
        return feature_view(features, model, cosines, (x, y))

    def clicked(self, path: str | None, model: str, method: str, event: gr.EventData) -> dict[str, Any]:
        """The features' viewer after a click at `event.x`, `event.y`, each 0 to 1."""
        return self.features(path, model, method, float(event.x), float(event.y))

    def next_key(self) -> str:
        self.number += 1
        return str(self.number)


def example(index: int) -> tuple[str, str]:
    """Path and words of an example."""
    name, words = EXAMPLES[index]
    return str(ASSETS / "pictures" / name), words


def hidden(name: str) -> dict[str, Any]:
    """An event of the page: named apart from the endpoints, and not one of them."""
    return {"api_name": f"page_{name}", "api_visibility": "private"}


def own(method: str | None) -> str | None:
    return None if method in (None, "", OWN_METHOD) else method


def build(settings: Settings | None = None) -> gr.Blocks:
    """The app.

    Args:
        settings: None takes them from the environment.

    Raises:
        ValueError: A variable of the environment is malformed.
    """
    settings = settings or Settings.from_environment()
    page = Page(settings)
    quick: dict[str, Any] = {"concurrency_id": "quick", "concurrency_limit": settings.quick_at_once}
    slow: dict[str, Any] = {"concurrency_id": "slow", "concurrency_limit": settings.slow_at_once}
    with gr.Blocks(
        title="SPAR: name it, see it",
        analytics_enabled=False,
        delete_cache=(max(60, settings.keep_files_s // 4), settings.keep_files_s),
    ) as demo:
        gr.HTML(HEAD, elem_id="head")
        with gr.Row(equal_height=False):
            with gr.Column(scale=4, min_width=320):
                picture = picture_input(
                    label="Picture", height=300, elem_id="picture", sources=["upload", "clipboard", "webcam"]
                )
                words = gr.Textbox(
                    label="Words", lines=2, max_lines=6, elem_id="words",
                    placeholder="road; car, automobile; sky",
                    info="; splits classes, a comma splits names of one class. Shift + Enter segments.",
                )  # fmt: skip
                vocabulary = gr.Dropdown(
                    [("Own words", ""), *((name, name) for name in vocabularies())],
                    value="",
                    label="or the words of a benchmark",
                    elem_id="vocabulary",
                )
                with gr.Accordion("Model", open=False):
                    model = gr.Dropdown(
                        list(settings.models), value=settings.model, label="Checkpoint", elem_id="model"
                    )
                    method = gr.Dropdown(
                        [(OWN_METHOD, OWN_METHOD), *((METHODS[name].title, name) for name in page.engine.methods)],
                        value=OWN_METHOD, label="Method of the last block", elem_id="method",
                    )  # fmt: skip
                examples = gr.Dataset(
                    components=[picture],
                    samples=[[str(ASSETS / "pictures" / name)] for name, _ in EXAMPLES],
                    type="index",
                    label="Examples: drawings, which the shipped models know",
                    elem_id="examples",
                )
            with gr.Column(scale=7, min_width=320), gr.Tabs():
                with gr.Tab("Segment", id="segment"):
                    run = gr.Button("Segment", variant="primary", elem_id="run")
                    answer = viewer("viewer", SEGMENT_HINT, elem_id="answer")
                    with gr.Row(elem_id="downloads"):
                        files = [
                            gr.DownloadButton(label, interactive=False, size="sm")
                            for label in ("Overlay", "Label map", "Classes")
                        ]
                with gr.Tab("Compare", id="compare"):
                    with gr.Row():
                        compare = gr.Button("Compare", variant="primary", elem_id="compare-run")
                        stop = gr.Button("Stop", variant="stop", elem_id="stop", interactive=False)
                    comparison = viewer("viewer", COMPARE_HINT, elem_id="comparison")
                with gr.Tab("Features", id="features"):
                    look = gr.Button("Show features", variant="primary", elem_id="look")
                    features = viewer("features", FEATURES_HINT, elem_id="feature-view")

        asked = [picture, words, model, method]
        at_once: dict[str, Any] = {"api_visibility": "private", "queue": False}
        segmenting = {"fn": page.segment, "inputs": asked, "outputs": [answer, *files], **hidden("segment"), **quick}
        gr.on([run.click, words.submit], show_progress_on=answer, **segmenting)
        loading = examples.click(example, examples, [picture, words], **at_once)
        loading.then(show_progress_on=answer, **segmenting)
        vocabulary.input(lambda name: vocabularies().get(name, ""), vocabulary, words, **at_once)

        compare.click(lambda: gr.update(interactive=True), None, stop, **at_once)
        running = compare.click(page.compare, asked, comparison, **hidden("compare"), **slow)
        running.then(lambda: gr.update(interactive=False), None, stop, **at_once)
        stop.click(page.stops.ask, None, None, **at_once)
        demo.unload(page.stops.ask)

        seen = [picture, model, method]
        look.click(page.features, seen, features, **hidden("features"), **quick)
        features.select(page.clicked, seen, features, show_progress="hidden", **hidden("clicked"), **quick)
        add_api(page, asked, quick, slow)
    demo.queue(max_size=settings.queue_size, default_concurrency_limit=settings.quick_at_once)
    demo.spar_page = page  # Gradio's class takes what it is given
    return demo


def add_api(page: Page, asked: list[Any], quick: dict[str, Any], slow: dict[str, Any]) -> None:
    """Named endpoints for programs. Errors are exceptions there, with the same words."""
    with gr.Column(visible=False):
        x = gr.Slider(0, 1, value=0.5, label="x")
        y = gr.Slider(0, 1, value=0.5, label="y")
        details = gr.JSON(label="result")
        drawn, label_map = gr.File(label="overlay"), gr.File(label="label_map")
        pca, cosine_map = gr.File(label="principal_components"), gr.File(label="similarity")
        trigger = gr.Button("API")

    def segment(picture: str, words: str, model: str, method: str) -> tuple[dict[str, Any], str, str]:
        """Segments a picture in one pass.

        Returns the classes with their areas and how long the encoder took, the overlay with its legend (PNG), and
        the label map (PNG), whose pixel values are positions in `words`, from 0.
        """
        try:
            answer = page.engine.segment(picture, words, model, own(method))
        except DemoError as error:
            raise gr.Error(str(error), print_exception=False) from None
        return facts(answer), *page.downloads.write(answer)[:2]

    def compare(picture: str, words: str, model: str, method: str) -> dict[str, Any]:
        """Segments a picture in one pass, with the sliding window, and with the distilled student where there is one.

        Returns for each the classes with their areas, the number of windows and the encoder's milliseconds.
        """
        engine = page.engine
        try:
            start = engine.teacher_of(model) or model
            student = model if start != model else engine.student_of(model)
            found = {"single_pass": page._timed(picture, words, start, method)}
            found["sliding_window"] = engine.segment(picture, words, start, own(method), window=True)
            if student is not None:
                found["student"] = page._timed(picture, words, student, method)
        except DemoError as error:
            raise gr.Error(str(error), print_exception=False) from None
        return {name: facts(answer) for name, answer in found.items()}

    def similarity(picture: str, model: str, method: str, x: float, y: float) -> tuple[dict[str, Any], str, str]:
        """Features of a picture and their similarity to those at a place.

        `x` and `y` are 0 to 1 from the left and the top. Returns the grid, the patch and the range of cosines, the
        picture of principal components (PNG) and the similarity as grey values (PNG, 0 is a cosine of -1, 255 of 1).
        """
        from PIL import Image

        try:
            features = page.engine.features(picture, model, own(method))
            cosines, patch = page.engine.similarity(features, y, x)
        except DemoError as error:
            raise gr.Error(str(error), print_exception=False) from None
        grey = Image.fromarray((127.5 * (1 + cosines)).round().clip(0, 255).astype("uint8"))
        about: dict[str, Any] = {"grid_hw": list(features.patch_embeds.shape[:2]), "patch": list(patch)}
        about["cosine"] = [round(float(cosines.min()), 4), round(float(cosines.max()), 4)]
        return about, page.downloads.save("pca.png", features.pca), page.downloads.save("similarity.png", grey)

    picture, _, model, method = asked
    trigger.click(segment, asked, [details, drawn, label_map], api_name="segment", **quick)
    trigger.click(compare, asked, details, api_name="compare", **slow)
    places = [picture, model, method, x, y]
    trigger.click(similarity, places, [details, pca, cosine_map], api_name="similarity", **quick)


def theme() -> gr.themes.Base:
    """Gradio's default with the fonts of the visitor's system: nothing is fetched from elsewhere."""
    return gr.themes.Default(
        primary_hue="blue",
        neutral_hue="slate",
        font=["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"],
        font_mono=["ui-monospace", "SFMono-Regular", "Menlo", "monospace"],
    )


def serve(
    demo: gr.Blocks,
    host: str | None = None,
    port: int | None = None,
    open_browser: bool = False,
    block: bool = True,
) -> str:
    """Serves the app; returns its address (at once with `block=False`).

    Only files that the app itself wrote or was given can be read through it.
    """
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    settings: Settings = demo.spar_page.settings  # type: ignore[attr-defined]
    _, url, _ = demo.launch(
        server_name=host,
        server_port=port,
        inbrowser=open_browser,
        share=False,
        quiet=True,
        show_error=True,
        ssr_mode=False,
        max_file_size=settings.max_file_mb * 1_000_000,
        allowed_paths=[],
        footer_links=["api"],
        theme=theme(),
        css=CSS,
        prevent_thread_lock=True,
    )
    if block:
        print(f"SPAR at {url} with {settings.model}; Ctrl-C stops it.", flush=True)
        demo.block_thread()
    return url
