"""The page: `build()` lays it out, `serve()` runs it. All work is the engine's, all pictures are the viewers'."""

from __future__ import annotations

import inspect
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import gradio as gr
from starlette.middleware import Middleware

from ..checkpoints import ASSETS
from ..methods.table import METHODS
from .guard import LOOPBACK, Guard, Refused, check_inputs
from .handlers import OWN_METHOD, Api, Page, in_words
from .payload import own_folder
from .settings import Settings
from .texts import COMPARE_HINT, EXAMPLES, FEATURES_HINT, SEGMENT_HINT, vocabularies

PAGE = Path(__file__).parent / "page"
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


def example(index: int) -> tuple[str, str]:
    """Path and words of an example."""
    name, words = EXAMPLES[index]
    return str(ASSETS / "pictures" / name), words


def hidden(name: str) -> dict[str, Any]:
    """An event of the page: named apart from the endpoints, and not one of them."""
    return {"api_name": f"page_{name}", "api_visibility": "private"}


def build(settings: Settings | None = None) -> gr.Blocks:
    """The app.

    Args:
        settings: None takes them from the environment.

    Raises:
        ValueError: A variable of the environment is malformed.
    """
    settings = settings or Settings.from_environment()
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    os.environ.setdefault("GRADIO_RUN_HISTORY", "False")  # a visitor's pictures and words are kept nowhere
    if "GRADIO_TEMP_DIR" not in os.environ:  # two pages with one folder delete each other's files
        os.environ["GRADIO_TEMP_DIR"] = str(own_folder())
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
                        [(OWN_METHOD, OWN_METHOD), *((METHODS[name].title, name) for name in settings.methods)],
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
                    threshold = gr.Slider(
                        0, 1, value=0, step=0.01, label="Uncertain pixels", elem_id="threshold",
                        info="0: every pixel gets a class. Higher: those whose best class is less probable get none.",
                    )  # fmt: skip
                    refine = gr.Dropdown(
                        [(f"{name}: {title}", name) for name, title in settings.refinement_menu.items()],
                        value=[], multiselect=True, label="Refinements", elem_id="refine",
                        visible=bool(settings.refinement_menu),
                    )  # fmt: skip
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
        segmenting: dict[str, Any] = {"inputs": [*asked, threshold, refine], "outputs": [answer, *files], **quick}
        segmenting |= {"show_progress_on": answer}
        gr.on([run.click, words.submit], page.segment, **segmenting, **hidden("segment"))
        gr.on([threshold.release, refine.input], page.again, **segmenting, **hidden("again"))
        loading = examples.click(example, examples, [picture, words], **at_once)
        loading.then(page.segment, **segmenting, **hidden("example"))
        vocabulary.input(lambda name: vocabularies().get(name, ""), vocabulary, words, **at_once)

        compare.click(lambda: gr.update(interactive=True), None, stop, **at_once)
        running = compare.click(page.compare, asked, comparison, **hidden("compare"), **slow)
        running.then(lambda: gr.update(interactive=False), None, stop, **at_once)
        stop.click(page.stops.ask, None, None, **at_once)
        demo.unload(page.stops.ask)

        seen = [picture, model, method]
        look.click(page.features, seen, features, **hidden("features"), **quick)
        features.select(page.clicked, seen, features, show_progress="hidden", **hidden("clicked"), **quick)
        add_api(page, asked, [threshold, refine], quick, slow)
    checked(demo)
    demo.queue(max_size=settings.queue_size, default_concurrency_limit=settings.quick_at_once)
    demo.spar_page = page  # Gradio's class takes what it is given
    return demo


def checked(demo: gr.Blocks) -> None:
    """Lets values reach the components only if they are of their kind; Gradio's own messages hold paths."""
    preprocess = demo.preprocess_data

    async def preprocess_data(block_fn: Any, inputs: list[Any], *rest: Any, **options: Any) -> Any:
        names = [str(component.label) for component in block_fn.inputs]
        if block_fn.api_visibility == "public":
            names = list(inspect.signature(block_fn.fn).parameters)[: len(names)]
        try:
            check_inputs(names, block_fn.inputs, inputs)
            return await preprocess(block_fn, inputs, *rest, **options)
        except Refused:
            raise
        except Exception as error:
            raise Refused(in_words(error)) from None

    demo.preprocess_data = preprocess_data  # type: ignore[method-assign]


def add_api(page: Page, asked: list[Any], choices: list[Any], quick: dict[str, Any], slow: dict[str, Any]) -> None:
    """Named endpoints for programs."""
    with gr.Column(visible=False):
        x = gr.Slider(0, 1, value=0.5, label="x")
        y = gr.Slider(0, 1, value=0.5, label="y")
        details = gr.JSON(label="result")
        drawn, label_map = gr.File(label="overlay"), gr.File(label="label_map")
        pca, cosine_map = gr.File(label="principal_components"), gr.File(label="similarity")
        trigger = gr.Button("API")

    api = Api(page)
    picture, _, model, method = asked
    trigger.click(api.segment, [*asked, *choices], [details, drawn, label_map], api_name="segment", **quick)
    trigger.click(api.compare, asked, details, api_name="compare", **slow)
    places = [picture, model, method, x, y]
    trigger.click(api.similarity, places, [details, pca, cosine_map], api_name="similarity", **quick)


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
    settings: Settings = demo.spar_page.settings  # type: ignore[attr-defined]
    host = host or os.environ.get("GRADIO_SERVER_NAME") or LOOPBACK[0]
    names = {*LOOPBACK, *(name.strip().lower() for name in settings.hosts.split(","))}
    max_upload_bytes = settings.max_file_mb * 1_000_000
    guard = Middleware(Guard, max_upload_bytes, hosts=names if host in LOOPBACK else None)

    @asynccontextmanager
    async def guarded(app: Any) -> AsyncIterator[None]:
        app.user_middleware.insert(0, guard)  # before Gradio's own, which answers strangers' pages
        app.middleware_stack = app.build_middleware_stack()
        yield

    _, url, _ = demo.launch(
        server_name=host,
        server_port=port,
        inbrowser=open_browser,
        share=False,
        quiet=True,
        show_error=False,  # what is meant for visitors is shown anyhow
        ssr_mode=False,
        max_file_size=max_upload_bytes,
        allowed_paths=[],
        footer_links=["api"],
        theme=theme(),
        css=CSS,
        prevent_thread_lock=True,
        app_kwargs={"lifespan": guarded},
    )
    if block:
        print(f"SPAR at {url} with {settings.model}; Ctrl-C stops it.", flush=True)
        demo.block_thread()
    return url
