"""Formulas: a recipe in LaTeX, and LaTeX in pages as MathML, which browsers show without a script."""

from __future__ import annotations

import re
from fractions import Fraction

from latex2mathml.converter import convert

from spar_hf.methods_spar import Recipe, Term

BLOCK = re.compile(r"^\$\$\n?(.+?)\n?\$\$$", re.M | re.S)
LAST = 12  # the methods count the blocks of a network of twelve


def as_mathml(text: str) -> str:
    """The text with each `$$ ... $$` on lines of its own as MathML."""
    return BLOCK.sub(lambda match: f'<div class="formula">{convert(match[1], display="block")}</div>', text)


def _weight(value: float) -> str:
    share = Fraction(value).limit_denominator(1000)
    if share == 1:
        return ""
    if share.denominator == 1:
        return str(share.numerator)
    return rf"\frac{{{share.numerator}}}{{{share.denominator}}}\,"


def _attention(term: Term) -> str:
    if term.scores == "identity":
        return "I"
    sign = term.scores + (r",\sigma" if term.sigma_patches else "")
    return rf"A_{{{sign}}}" + (f"^{{({term.block})}}" if term.block != LAST else "")


def of_recipe(recipe: Recipe) -> tuple[str, list[str]]:
    """What a recipe computes, in LaTeX, and the lines of words that its signs need."""
    several = recipe.blocks > 1
    block = "^{(b)}" if several else ""
    maps = " + ".join(_weight(term.weight) + _attention(term) for term in recipe.terms)
    if len(recipe.terms) > 1 or several:
        maps = rf"\left({maps}\right){block}"
    mixed = f"{maps} V{block} W_o{block}"
    if several:
        first = f"12 - {recipe.blocks - 1}"
        mixed = rf"\sum_{{b = {first}}}^{{12}} {mixed}"
    formula = "y = " + ("x + " if recipe.residual else "") + mixed
    if recipe.feed_forward:
        formula += r", \qquad z = y + \mathrm{MLP}(\mathrm{LN}(y))"
    words = [
        f"x is what enters block {13 - recipe.blocks if several else LAST} of twelve; Q, K and V are the projections "
        "of the normalised input; the patches' features are the final norm and CLIP's projection of "
        f"{'z' if recipe.feed_forward else 'y'}, with "
        + (" and ".join(f"the {part}" for part in _kept(recipe)) if _kept(recipe) else "neither residual nor MLP")
        + "."
    ]
    kinds = {term.scores for term in recipe.terms} - {"identity"}
    if "identity" in {term.scores for term in recipe.terms}:
        words.append("The map I leaves each value where it is: no patch attends to another.")
    for kind in sorted(kinds):
        letters = " ".join(kind.upper())
        words.append(f"A with the index {kind} is softmax({letters}ᵀ / √d), head by head.")
    sigma = {term.sigma_patches for term in recipe.terms if term.sigma_patches}
    if sigma:
        words.append(
            f"Where the index has σ, exp(−distance² / 2σ²) is added to the scores of patches first, σ = "
            f"{', '.join(f'{value:g}' for value in sorted(sigma))} patches."
        )
    if {term.block for term in recipe.terms} != {LAST}:
        words.append("A number in brackets is the block whose projections meet.")
    turns = {term.iterations for term in recipe.terms if term.iterations}
    if turns:
        words.append(
            f"Before they meet, the tokens go {max(turns)} time{'s' * (max(turns) > 1)} through "
            "X ← softmax(t X Xᵀ) X at unit length; t takes the place of 1 / √d."
        )
    return formula, words


def _kept(recipe: Recipe) -> list[str]:
    return [name for name, there in (("residual", recipe.residual), ("MLP", recipe.feed_forward)) if there]
