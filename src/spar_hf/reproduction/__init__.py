"""Reproducing published numbers: what is needed and where it comes from, the rows to evaluate, and the report."""

from .archives import Archive, Problem, download, unpack
from .datasets import DATASETS, DataSet, data_set_of, get_data
from .needs import Need, get, needs
from .plan import PARTS, Row, plan, select
from .report import Outcome, as_json, as_markdown
from .weights import WEIGHTS, Weights, get_model, get_network

__all__ = [
    "DATASETS",
    "PARTS",
    "WEIGHTS",
    "Archive",
    "DataSet",
    "Need",
    "Outcome",
    "Problem",
    "Row",
    "Weights",
    "as_json",
    "as_markdown",
    "data_set_of",
    "download",
    "get",
    "get_data",
    "get_model",
    "get_network",
    "needs",
    "plan",
    "select",
    "unpack",
]
