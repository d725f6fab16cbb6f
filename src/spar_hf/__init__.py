"""Open-vocabulary segmentation in one forward pass, on the Hugging Face stack.

Importing the package registers its models, processors and the pipeline task with transformers' Auto classes.
"""

from .configuration_spar import SparConfig, SparVisionConfig
from .methods_spar import METHODS, Method
from .modeling_spar import SparModel, SparOutput, SparVisionModel, SparVisionOutput
from .sliding_window import SlidingWindow


__version__ = "0.1.0"
