"""Refinements: named ways to better label maps, independent of how the scores were made.

`REFINEMENTS` is the table of them; `Refined` puts those that are asked for around a segmenter, in the table's order.
"""

from .floss import floss_templates
from .refined import Refined
from .table import REFINEMENTS, Refinement, find_refinements

__all__ = ["REFINEMENTS", "Refined", "Refinement", "find_refinements", "floss_templates"]
