"""What the page's buttons and the endpoints do: the engine's work, as values of viewers or as JSON and files."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image

from .engine import Answer, Engine, number
from .guard import Refused
from .models import Stopped
from .payload import Downloads, facts, feature_view, message, milliseconds, view
from .pictures import DemoError
from .settings import Settings

OWN_METHOD = "the model's own"
FAILED = "Something failed here; the server's log says what. Try another picture, model or method."
logger = logging.getLogger(__name__)


def in_words(error: Exception) -> str:
    """What a visitor is told: the engine's own sentences; of all else only that it failed, for it may hold paths."""
    if isinstance(error, DemoError):
        return str(error)
    logger.error("a request failed", exc_info=error)
    return FAILED


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

    def segment(
        self,
        path: str | None,
        words: str,
        model: str,
        method: str,
        background_threshold: float = 0.0,
        refine: Sequence[str] = (),
    ) -> tuple[Any, ...]:
        """The viewer, and the three downloads."""
        asked: dict[str, Any] = {"background_threshold": background_threshold, "refine": refine}
        try:
            answer = self.engine.segment(path, words, model, own(method), **asked)
            files = self.downloads.write(answer)
        except Exception as error:
            return message(in_words(error)), *(gr.update(value=None, interactive=False) for _ in range(3))
        rows, columns = answer.grid_hw
        note = f"{columns} × {rows} patches · {milliseconds(answer.encode_ms)}"
        shown = view([{"title": f"{model}, one pass", "note": note, "answer": answer}], [answer], self.next_key())
        return shown, *(gr.update(value=path, interactive=True) for path in files)

    def again(self, path: str | None, words: str, *asked: Any) -> tuple[Any, ...]:
        """`segment` after a slider was moved: nothing happens before there is something to segment."""
        if not path or not (words or "").strip():
            return tuple(gr.skip() for _ in range(4))
        return self.segment(path, words, *asked)

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
        except Exception as error:
            yield message(in_words(error))
        finally:
            self.stops.running.pop(session, None)

    def _compare(
        self, path: str | None, words: str, model: str, method: str, stop: threading.Event, progress: gr.Progress
    ) -> Iterator[dict[str, Any]]:
        engine, key = self.engine, self.next_key()
        start, student = self.pair(model)
        first = engine.segment(path, words, start, own(method), timed=True)
        single = {"title": f"Single pass, {start}", "note": _one_pass(first), "answer": first}
        answers = [first]
        last: dict[str, Any] = {"title": "Distilled student", "note": "", "wait": f"No student of {start} ships yet."}
        if student is not None:
            second = engine.segment(path, words, student, own(method), timed=True)
            last = {"title": f"Distilled student, {student}", "note": _one_pass(second), "answer": second}
            answers.append(second)
        waiting: dict[str, Any] = {"title": "Sliding window"}
        try:
            windows = engine.models.num_windows(first.picture.input_hw, start, own(method))
        except DemoError as error:
            yield view([dict(single), {**waiting, "note": "", "wait": str(error)}, dict(last)], answers, key)
            return
        waiting["note"] = f"{windows} windows"
        yield view([dict(single), {**waiting, "wait": "Sliding the window…"}, dict(last)], answers, key)

        done = 0

        def watch(count: int) -> None:
            nonlocal done
            done += count
            progress((done, windows), desc="Sliding window", unit="windows")
            if stop.is_set():
                raise Stopped

        try:
            teacher = engine.segment(path, words, start, own(method), watch=watch)
        except Stopped:
            stopped = {**waiting, "note": f"stopped after {done} of {windows}", "wait": "Stopped."}
            yield view([dict(single), stopped, dict(last)], answers, key)
            return
        note = f"{teacher.windows} windows · {milliseconds(teacher.encode_ms)}"
        panels = [dict(single), {"title": f"Sliding window, {start}", "note": note, "answer": teacher}, dict(last)]
        yield view(panels, [answers[0], teacher, *answers[1:]], key)

    def pair(self, model: str) -> tuple[str, str | None]:
        """The model whose passes are compared, and the student that was distilled from it, if there is one."""
        start = self.engine.models.teacher_of(model) or model
        return start, model if start != model else self.engine.models.student_of(model)

    def features(self, path: str | None, model: str, method: str, x: float = 0.5, y: float = 0.5) -> dict[str, Any]:
        """The features' viewer."""
        try:
            features = self.engine.features(path, model, own(method))
            cosines, _ = self.engine.similarity(features, y, x)
        except Exception as error:
            return message(in_words(error))
        return feature_view(features, model, cosines, (x, y))

    def clicked(self, path: str | None, model: str, method: str, event: gr.EventData) -> dict[str, Any]:
        """The features' viewer after a click at `event.x`, `event.y`, each 0 to 1."""
        places = event._data if isinstance(event._data, dict) else {}
        try:
            x, y = (number(name, places.get(name)) for name in "xy")
        except DemoError as error:
            return message(str(error))
        return self.features(path, model, method, x, y)

    def next_key(self) -> str:
        self.number += 1
        return str(self.number)


class Api:
    """The endpoints for programs. Mistakes are exceptions there, with the same words."""

    def __init__(self, page: Page) -> None:
        self.page = page

    def segment(
        self,
        picture: str,
        words: str,
        model: str,
        method: str,
        background_threshold: float = 0.0,
        refine: Sequence[str] = (),
    ) -> tuple[dict[str, Any], str, str]:
        """Segments a picture in one pass.

        Returns the classes with their areas, what they were made with and how long the network took, the overlay with
        its legend (PNG, at most 1280 pixels), and the label map (PNG, the picture's own size), whose pixel values are
        positions in `words`, from 0; a pixel without a class has the highest value, 255 or 65535.

        Pixels whose best class has a probability under `background_threshold` have no class. `refine` is a list of
        refinements.
        """
        asked: dict[str, Any] = {"background_threshold": background_threshold, "refine": refine}
        answer = self._words(self.page.engine.segment, picture, words, model, own(method), **asked)
        return facts(answer), *self.page.downloads.write(answer)[:2]

    def compare(self, picture: str, words: str, model: str, method: str) -> dict[str, Any]:
        """Segments a picture in one pass, with the sliding window, and with the distilled student where there is one.

        Returns for each the classes with their areas, the number of windows and the network's milliseconds.
        """

        def found() -> dict[str, Answer]:
            start, student = self.page.pair(model)
            single = self.page.engine.segment(picture, words, start, own(method), timed=True)
            window = self.page.engine.segment(picture, words, start, own(method), watch=lambda _: None)
            answers = {"single_pass": single, "sliding_window": window}
            if student is not None:
                answers["student"] = self.page.engine.segment(picture, words, student, own(method), timed=True)
            return answers

        return {name: facts(answer) for name, answer in self._words(found).items()}

    def similarity(
        self, picture: str, model: str, method: str, x: float = 0.5, y: float = 0.5
    ) -> tuple[dict[str, Any], str, str]:
        """Features of a picture and their similarity to those at a place.

        `x` and `y` are 0 to 1 from the left and the top. Returns the grid, the patch and the range of cosines, the
        picture of principal components (PNG) and the similarity as grey values (PNG, 0 is a cosine of -1, 255 of 1),
        both at most 1280 pixels.
        """
        engine = self.page.engine
        features = self._words(engine.features, picture, model, own(method))
        cosines, patch = self._words(engine.similarity, features, y, x)
        grey = Image.fromarray((127.5 * (1 + cosines)).round().clip(0, 255).astype(np.uint8))
        about: dict[str, Any] = {"grid_hw": list(features.patch_embeds.shape[:2]), "patch": list(patch)}
        about["cosine"] = [round(float(cosines.min()), 4), round(float(cosines.max()), 4)]
        downloads = self.page.downloads
        return about, downloads.save("pca.png", features.pca), downloads.save("similarity.png", grey)

    def _words(self, work: Callable[..., Any], *given: Any, **options: Any) -> Any:
        try:
            return work(*given, **options)
        except Exception as error:
            raise Refused(in_words(error)) from None


def own(method: str | None) -> str | None:
    return None if method in (None, "", OWN_METHOD) else method


def _one_pass(answer: Answer) -> str:
    return f"1 pass · {milliseconds(answer.encode_ms)}"
