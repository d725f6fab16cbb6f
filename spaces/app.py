"""A Space of Hugging Face: the demonstration of spar-hf. SPAR_MODEL names its model."""

from spar_hf.demo.app import build, serve

demo = build()

if __name__ == "__main__":
    serve(demo)
