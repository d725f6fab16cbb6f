"""One pass, and SPAR's teacher around the same network: same call, same shape, different cost.

python examples/sliding_window.py
"""

import time
from pathlib import Path

import torch

import spar_hf

PICTURE = Path(spar_hf.__file__).parent / "assets" / "pictures" / "demo.png"

model, processor = spar_hf.load("tiny")
pixel_values = processor(images=str(PICTURE), return_tensors="pt")["pixel_values"]
single_pass = model.vision_model
teacher = spar_hf.SlidingWindow(single_pass, stride_px=24)

for name, encoder in (("single pass", single_pass), ("sliding window", teacher)):
    start = time.perf_counter()
    with torch.inference_mode():
        patch_embeds = encoder(pixel_values).patch_embeds
    print(f"{name:>15}: {tuple(patch_embeds.shape)} in {time.perf_counter() - start:.2f} s")
print(f"the window took {teacher.num_windows(*pixel_values.shape[2:])} positions")
