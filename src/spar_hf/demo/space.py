"""The files of a Space that shows one model. `spaces/` in the repository is what this writes for the shipped one."""

from __future__ import annotations

from importlib.metadata import version

from huggingface_hub import SpaceCard, SpaceCardData

LAUNCHER = '''"""A Space of Hugging Face: the demonstration of spar-hf. SPAR_MODEL names its model."""

{setting}from spar_hf.demo.app import build, serve

demo = build()

if __name__ == "__main__":
    serve(demo)
'''
SETTING = """import os

os.environ.setdefault("SPAR_MODEL", "{model}")

"""

TEXT = """---
{{ card_data }}
---

# SPAR

Name what you look for and the picture answers: any image, any size, any words, in one forward pass
([paper](https://arxiv.org/abs/2604.02252)). The model is {{ model }}.

Variables of the Space: `SPAR_MODEL` (a Hub id, or `tiny`) and the limits, which `python -m spar_hf.demo.settings`
lists. On hardware with a GPU it is used.
"""


def space_files(model: str | None = None) -> dict[str, str]:
    """README.md with the Space's header, app.py and requirements.txt, by name.

    Args:
        model: Hub id; None is the best model that ships with the package.
    """
    data = SpaceCardData(
        title="SPAR",
        sdk="gradio",
        sdk_version=version("gradio"),
        python_version="3.11",
        app_file="app.py",
        license="apache-2.0",
        short_description="Open-vocabulary segmentation in one pass",
        models=[model] if model else None,
        colorFrom="blue",
        colorTo="green",
        pinned=False,
    )
    card = SpaceCard.from_template(
        data, template_str=TEXT, model=f"`{model}`" if model else "the one that ships with the package"
    )
    return {
        "README.md": f"{str(card).rstrip()}\n",
        "app.py": LAUNCHER.format(setting=SETTING.format(model=model) if model else ""),
        "requirements.txt": "spar-hf\n",
    }
