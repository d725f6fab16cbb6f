"""Recipes: what the methods do in CLIP's last block, as data. The table of methods is `spar_hf.methods.table`.

A *recipe* is a sum of attention maps, each applied to the last block's values; every purely CLIP-based method that
changes only the last block's attention is one choice of its numbers ("Training-Free Open-Vocabulary Semantic
Segmentation", arXiv 2505.22209, gives the survey of them). Recipes were written from the papers.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

from .names_spar import one_of, unknown

SCORES = ("identity", "qk", "qq", "kk", "vv")
MAX_ITERATIONS = 1000


def block_index(block: int, num_layers: int) -> int:
    """0-based index, in a network of `num_layers` blocks, of a block counted from 1 in the methods' networks of 12."""
    return math.ceil(block * num_layers / 12) - 1


@dataclass(frozen=True)
class Term:
    """One attention map of a recipe: `weight * softmax(d^-0.5 X Yᵀ + locality)`, applied to the last block's values.

    Attributes:
        scores: which projections meet: `qk`, `qq`, `kk`, `vv`; or `identity`, the map that leaves each value alone.
        weight: factor of the map. Weights need not sum to one (SCLIP's maps are added).
        sigma_patches: adds exp(-distance² / (2 sigma²)) to the scores between patches (NACLIP); None adds nothing.
        block: whose projections, 1-based in a network of twelve blocks; scaled to other depths. 12 is the last.
        iterations: with n >= 1 and t = d^-0.5 times the image's mean length of a normalised token, X goes n times
            through X <- softmax(t X Xᵀ) X, at unit length before each turn and after the last one, and the map is
            softmax(t X Xᵀ) (GEM, CVPR 2024, section 3.2).
    """

    scores: str
    weight: float = 1.0
    sigma_patches: float | None = None
    block: int = 12
    iterations: int = 0

    def __post_init__(self) -> None:
        one_of("recipe term's scores", self.scores, SCORES)
        if not isinstance(self.weight, int | float) or not abs(self.weight) < float("inf"):
            raise ValueError(f"recipe term's weight is {self.weight!r}; it must be a number.")
        if self.sigma_patches is not None and not self.sigma_patches > 0:
            raise ValueError(f"sigma_patches is {self.sigma_patches}; it must be positive, or None for no locality.")
        if not isinstance(self.block, int) or not 1 <= self.block <= 12:
            raise ValueError(f"recipe term's block is {self.block}; it must be 1 to 12 (12 is the last block).")
        turns = isinstance(self.iterations, int) and 0 <= self.iterations <= MAX_ITERATIONS
        if not turns or (self.iterations and self.scores not in ("qq", "kk", "vv")):
            raise ValueError(
                f"recipe term's iterations is {self.iterations} with scores {self.scores!r}; it must be 0, or 1 to "
                f"{MAX_ITERATIONS} with qq, kk or vv."
            )

    def index(self, num_layers: int) -> int:
        """0-based index of the term's block in a network of `num_layers` blocks."""
        return block_index(self.block, num_layers)


@dataclass(frozen=True)
class Recipe:
    """How the patches leave the last block: `[x +] out_proj(sum of terms) [+ mlp]`.

    Attributes:
        terms: the attention maps that are summed.
        residual: keep the block's input.
        feed_forward: run the block's MLP on the result.
        blocks: with n > 1, a second path starts at the input of the n-th last block and collects out_proj(sum of
            terms) of each block from there, while the usual path goes on unchanged (CLIP Surgery).
    """

    terms: tuple[Term, ...]
    residual: bool = True
    feed_forward: bool = True
    blocks: int = 1

    def __post_init__(self) -> None:
        terms = tuple(term if isinstance(term, Term) else Term(**term) for term in self.terms)
        object.__setattr__(self, "terms", terms)
        if not terms:
            raise ValueError("recipe has no terms; give at least one, such as {'scores': 'identity'}.")
        if not isinstance(self.blocks, int) or self.blocks < 1:
            raise ValueError(f"recipe's blocks is {self.blocks}; it must be at least 1.")
        if self.blocks > 1 and (self.feed_forward or any(term.block != 12 for term in terms)):
            raise ValueError("a recipe over several blocks takes feed_forward=False and terms of its own block only.")

    def to_dict(self) -> dict:
        """JSON form, for a configuration."""
        return {**asdict(self), "terms": [asdict(term) for term in self.terms]}


@dataclass(frozen=True)
class NamedRecipe:
    """A recipe and the position rule that its authors ran it with; see `resize_positions`."""

    recipe: Recipe
    position_interpolation: str = "offset"


RECIPES: dict[str, NamedRecipe] = {
    "clip": NamedRecipe(Recipe((Term("qk"),)), "size"),
    "maskclip": NamedRecipe(Recipe((Term("identity"),))),
    # A sum, not a mean: the rows of the map add to 2 in the authors' code as well.
    "sclip": NamedRecipe(Recipe((Term("qq"), Term("kk")))),
    "clearclip": NamedRecipe(Recipe((Term("qq"),), residual=False, feed_forward=False)),
    "naclip": NamedRecipe(Recipe((Term("kk", sigma_patches=5.0),), residual=False, feed_forward=False)),
    "cliptrase": NamedRecipe(Recipe((Term("qq"), Term("kk"), Term("vv")))),
    "clip_surgery": NamedRecipe(Recipe((Term("vv"),), feed_forward=False, blocks=6), "bilinear"),
    "gem": NamedRecipe(
        Recipe(
            tuple(Term(scores, weight=1 / 3, iterations=1) for scores in ("qq", "kk", "vv")),
            feed_forward=False,
            blocks=6,
        ),
        "antialias",
    ),
    "itaclip": NamedRecipe(
        Recipe(
            (
                *(Term(scores, weight=1 / 2) for scores in ("qq", "kk")),
                *(Term(scores, weight=1 / 6, block=block) for block in (7, 8, 10) for scores in ("qq", "kk")),
            ),
            feed_forward=False,
        )
    ),
    # tau ((1 - lambda) softmax(kk + locality) + lambda R), R the mean plain attention of blocks 6 to 9;
    # tau = 2, lambda = 0.4, the authors' for three of their eight data sets (0.2 to 0.6).
    "resclip": NamedRecipe(
        Recipe(
            (
                Term("kk", weight=2 * 0.6, sigma_patches=5.0),
                *(Term("qk", weight=2 * 0.4 / 4, block=block) for block in (6, 7, 8, 9)),
            ),
            residual=False,
            feed_forward=False,
        )
    ),
}


def find_recipe(name: str) -> NamedRecipe:
    """The recipe called `name`.

    Raises:
        ValueError: there is none; the message lists those that there are and the nearest name.
    """
    if name not in RECIPES:
        raise ValueError(
            unknown("recipe", name, RECIPES) + " A method that is more than a last block goes around a loaded tower: "
            f"spar_hf.build_encoder(vision, {name!r})."
        )
    return RECIPES[name]
