"""What a model takes while something is computed with it, predicted from shapes: a batch's activations, training."""

from dataclasses import dataclass
from typing import Any

from moeprune.models.shape import ExpertShape

FLOAT32_BYTES = 4
# Of a parameter that trains with AdamW: in float32 itself, its gradient and two moments.
TRAINED_BYTES = 4 * FLOAT32_BYTES


@dataclass(frozen=True)
class Activations:
    """What ``tokens`` tokens, a batch, take at once on a model of this config; numbers of ``itemsize`` bytes.

    ``layer``: the hidden state before and after a decoder layer, and gate, up and activation of each token's K experts,
    T (2 H + 3 K C); attention and shared experts are not counted. ``logits``: T x vocabulary, as computed and in
    float32.
    """

    tokens: int
    shape: ExpertShape
    config: Any
    itemsize: int

    @property
    def hidden(self) -> int:
        """The hidden state of the batch."""
        return self.tokens * self.config.hidden_size * self.itemsize

    @property
    def layer(self) -> int:
        """What one decoder layer makes on the way."""
        channels = 3 * self.shape.top_k * self.shape.width
        return 2 * self.hidden + self.tokens * channels * self.itemsize

    @property
    def logits(self) -> int:
        """The predictions of the batch."""
        return self.tokens * self.config.vocab_size * (self.itemsize + FLOAT32_BYTES)

    def backward(self, checkpointing: bool) -> int:
        """What a backward pass through the whole model finds in memory: every layer's activations, or with gradient
        checkpointing each one's input and one layer's activations; the logits and their gradient."""
        layers = self.config.num_hidden_layers
        kept = layers * self.hidden + self.layer if checkpointing else layers * self.layer
        return kept + 2 * self.logits


def adapter_parameters(shape: ExpertShape, hidden_size: int, live_widths: int, rank: int, dora: bool) -> int:
    """Parameters of adapters of this rank on gate, up and down of every expert, whose widths sum to ``live_widths``.

    A and B: 3 r (H + C) an expert; DoRA's magnitudes: 2 C + H. Experts without channels are counted as if they had
    some, as the plan that empties them is not known yet.
    """
    experts = shape.layers * shape.experts
    low_rank = 3 * rank * (experts * hidden_size + live_widths)
    return low_rank + (2 * live_widths + experts * hidden_size if dora else 0)
