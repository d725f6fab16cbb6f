"""The picture book: scenes drawn by code, crisp at any resolution, with exact masks and captions."""

from .dataset import PictureBook, picture_book_dataset

__all__ = ["PictureBook", "picture_book_dataset"]
