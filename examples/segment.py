"""Segments a picture by words, in five lines. Prints the classes and how much of the picture each has.

python examples/segment.py [IMAGE]
"""

import sys
from pathlib import Path

from transformers import pipeline

import spar_hf

PICTURE = Path(spar_hf.__file__).parent / "assets" / "pictures" / "demo.png"

model, processor = spar_hf.load("tiny")
segment = pipeline("open-vocabulary-segmentation", model=model, processor=processor)
result = segment(
    sys.argv[1] if len(sys.argv) > 1 else str(PICTURE),
    candidate_labels="cake; car, automobile; tree; apple; star; sea; sky; sand",
)
for found in result["segments"]:
    print(f"{found['label']:>8} {found['area_fraction']:.0%}")
