"""A Space of Hugging Face: the demonstration of spar-hf with the model that SPAR_MODEL names."""

import os

os.environ.setdefault("SPAR_MODEL", "tiny-spar")

from spar_hf.demo.app import build, serve

demo = build()

if __name__ == "__main__":
    serve(demo)
