"""A method of one's own: a last block is a sum of attention maps, written as a recipe.

python examples/own_method.py
"""

from pathlib import Path

import torch

import spar_hf
from spar_hf.methods_spar import Recipe, Term

PICTURE = Path(spar_hf.__file__).parent / "assets" / "pictures" / "demo.png"

# Queries meet queries and values meet values, near patches count more, no residual and no MLP.
recipe = Recipe(
    (Term("qq", weight=0.5), Term("vv", weight=0.5, sigma_patches=3.0)), residual=False, feed_forward=False
)

model, processor = spar_hf.load("tiny", method="clearclip", recipe=recipe.to_dict())
words = processor.encode_labels(model, "cake; car, automobile; tree; apple; star; sea; sky; sand")
inputs = processor(images=str(PICTURE), return_tensors="pt")
with torch.inference_mode():
    outputs = model.vision_model(inputs["pixel_values"])
(label_map,) = processor.post_process_semantic_segmentation(outputs, inputs["original_sizes"].tolist(), words)
for class_id, title in enumerate(words.labels.class_names):
    print(f"{title:>8} {(label_map == class_id).float().mean():.0%}")
