"""Draws test scenes of the picture book; without arguments, the pictures that ship with the package.

python examples/draw_pictures.py [--scenes 12 4 7 --height-px 512 --width-px 768 --output FOLDER]
"""

import argparse
from pathlib import Path

from PIL import Image

import spar_hf
from spar_hf.picture_book.dataset import PictureBook

ASSETS = Path(spar_hf.__file__).parent / "assets" / "pictures"
SHIPPED = {12: "demo", 4: "night-road", 7: "sandbox", 14: "five-things"}

parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
parser.add_argument("--scenes", type=int, nargs="+", default=list(SHIPPED))
parser.add_argument("--height-px", type=int, default=512)
parser.add_argument("--width-px", type=int, default=768)
parser.add_argument("--output", type=Path, default=ASSETS)
args = parser.parse_args()

args.output.mkdir(parents=True, exist_ok=True)
book = PictureBook("test", args.height_px, args.width_px)
for number in args.scenes:
    scene = book.scene(number)
    path = args.output / f"{SHIPPED.get(number, f'scene-{number}')}.png"
    Image.fromarray(scene.image).save(path, optimize=True)
    print(f"{path.name}: {scene.caption}")
