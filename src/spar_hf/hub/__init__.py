"""Publishing on the Hugging Face Hub: what is uploaded, and the model card."""

from .publish import publish

__all__ = ["publish"]
