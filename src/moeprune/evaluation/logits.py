"""The logits of a model whose layers are walked one by one, over all batches, a few tokens at a time."""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from moeprune.models.adapter import decoder_layers
from moeprune.models.layers.calls import logits_after
from moeprune.models.layers.streaming import Model, StreamedModel, skeleton
from moeprune.models.layers.walk import Batches, walk_layers

# Logits that are in memory at once: 256 MiB in float32.
LOGITS_AT_ONCE = 2**26


def last_layer_outputs(model: Model, batches: Batches, description: str) -> Iterator[Tensor]:
    """What the last decoder layer gives for each batch [B, S, H], in their order.

    All batches go through a layer before the next; those of a streamed model in groups whose hidden states fit in its
    ``activations_gib``, each of which reads all layers anew.
    """
    last = len(list(decoder_layers(skeleton(model)))) - 1
    for group in _groups(model, batches):
        for visit in walk_layers(model, group, description):
            if visit.depth == last:
                for (_, y_TH), (input_ids_BS, _) in zip(visit.outputs, group, strict=True):
                    yield y_TH.unflatten(0, input_ids_BS.shape)


def logits_at(
    model: Model, batch: tuple[Tensor, Tensor], y_BSH: Tensor, positions: Sequence[int]
) -> Iterator[tuple[Sequence[int], Tensor]]:
    """The logits [B, P, V] at ``positions`` of a batch, a few positions at a time, each with those positions."""
    vocabulary = skeleton(model).config.get_text_config().vocab_size
    at_once = max(1, LOGITS_AT_ONCE // (len(y_BSH) * vocabulary))
    for start in range(0, len(positions), at_once):
        some = positions[start : start + at_once]
        yield some, logits_after(skeleton(model), *batch, y_BSH, torch.tensor(some))


def _groups(model: Model, batches: Batches) -> Iterable[Batches]:
    if not isinstance(model, StreamedModel):
        return [batches]
    token_bytes = model.config.get_text_config().hidden_size * model.model.dtype.itemsize
    limit = model.activations_gib * 2**30
    groups: list[list[tuple[Tensor, Tensor]]] = []
    held = 0
    for batch in batches:
        size = batch[0].numel() * token_bytes
        if not groups or held + size > limit:
            groups.append([])
            held = 0
        groups[-1].append(batch)
        held += size
    return groups
