"""A UNet's attention while it runs, shown head by head to whoever asks, through the processors of diffusers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Attention:
    """What a layer of the UNet does in this pass, of one image or prompt.

    Attributes:
        name: as `down_blocks.2.attentions.1.transformer_blocks.0.attn1`; attn1 is over pixels, attn2 over the text.
        queries: (heads, h * w, d).
        keys: (heads, M, d): pixels, or tokens.
        scale: factor on their products.
        output: (h * w, C), of the layer, before its residual.
        number: of the prompt, of those of the pass.
    """

    name: str
    queries: Tensor
    keys: Tensor
    scale: float
    output: Tensor
    number: int = 0

    @property
    def num_heads(self) -> int:
        return len(self.queries)

    @property
    def side(self) -> int:
        """Rows and columns of the square of pixels."""
        return round(self.queries.shape[1] ** 0.5)

    def scores(self, head: int) -> Tensor:
        """One head's scores before the soft-max, (h * w, M) fp32."""
        return self.queries[head].float() @ self.keys[head].float().T * self.scale

    def probabilities(self, head: int) -> Tensor:
        """One head's attention, (h * w, M) fp32; rows sum to 1."""
        return self.scores(head).softmax(dim=-1)

    def mean(self) -> Tensor:
        """The mean attention of all heads, (h * w, M) fp32; one head's is held beside it."""
        total = self.probabilities(0)
        for head in range(1, self.num_heads):
            total += self.probabilities(head)
        return total / self.num_heads


Reader = Callable[[Attention], None]


class Reading:
    """An attention processor that shows what its layer does to a reader, and does what the former one did."""

    def __init__(self, name: str, former: Any, read: Reader) -> None:
        self.name, self.former, self.read = name, former, read

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        output: Tensor = self.former(attn, hidden_states, encoder_hidden_states, *args, **kwargs)
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        queries, keys = (
            projected.unflatten(-1, (attn.heads, -1)).transpose(1, 2)  # (B, N, heads * d) -> (B, heads, N, d)
            for projected in (attn.to_q(hidden_states), attn.to_k(context))
        )
        for number in range(len(queries)):
            self.read(Attention(self.name, queries[number], keys[number], attn.scale, output[number], number))
        return output
