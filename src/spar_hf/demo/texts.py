"""What both pages show, this one and `spaces/browser`: hints, examples, vocabularies. Imports no Gradio."""

from __future__ import annotations

from functools import cache

from ..evaluation import load_vocabulary
from ..picture_book.dataset import CLASSES as PICTURE_BOOK
from ..published import BENCHMARKS

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
<p>Every patch of the picture goes to the nearest of your words, so name the ground too. Or let
<b>Uncertain pixels</b> take away what none of them names well.</p>"""
COMPARE_HINT = """<h3>One pass against hundreds</h3>
<ol><li><b>Single pass</b>: the network once over the whole picture, far larger than it was trained on.</li>
<li><b>Sliding window</b>: the same network on every window of its own size, averaged. Better, and slow.</li>
<li><b>Distilled student</b>: one pass again, after learning from the window.</li></ol>
<p>Same picture, same words, with the time of each.</p>"""
FEATURES_HINT = """<h3>What the network sees</h3>
<p>Each patch becomes one vector. Their three main directions are shown as red, green and blue: what has the same
colour is alike to the network.</p>
<p>Click a place, or move there with the arrow keys, to see which patches are similar to it.</p>"""


@cache
def vocabularies() -> dict[str, str]:
    """The vocabularies of the menu, written as a visitor would."""
    found = {"Picture book": PICTURE_BOOK}
    found |= {name: load_vocabulary(name).classes for name in BENCHMARKS}
    return {name: "; ".join(", ".join(names) for names in classes) for name, classes in found.items()}
