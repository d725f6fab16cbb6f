"""Label options: named ways to turn patch features into better label maps, independent of how the features were made.

`LABEL_OPTIONS` is the table of them, `Refinement` runs those that are asked for, in the table's order.
"""

from .floss import floss_templates
from .options import LABEL_OPTIONS, LabelOption
from .refinement import Refinement

__all__ = ["LABEL_OPTIONS", "LabelOption", "Refinement", "floss_templates"]
