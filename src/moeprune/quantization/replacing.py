"""What quantizers share: each matrix that the selection names is replaced, layer by layer, and checked to be."""

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moeprune.errors import ModelError, NumericalError
from moeprune.models.adapter import decoder_layers
from moeprune.models.compressed.quantizable import QuantizedParts
from moeprune.models.layers.streaming import Model, skeleton
from moeprune.models.layers.walk import each_layer
from moeprune.models.layers.workspace import Workspace
from moeprune.models.runtime.grouped import GroupedEmbedding, GroupedWeight, TiedHead, put_embedding

FinishedLayer = tuple[int, str, nn.Module]
# A linear layer -> what stands for it in fewer bits.
QuantizeLinear = Callable[[nn.Linear], nn.Module]
QuantizeTable = Callable[[nn.Embedding], GroupedEmbedding]


@torch.no_grad()
def replaced_layers(
    model: Model,
    parts: QuantizedParts,
    workspace: Workspace,
    bits: int,
    quantize_linear: QuantizeLinear,
    quantize_table: QuantizeTable,
) -> Iterator[FinishedLayer]:
    """Replace all matrices in ``parts``, and yield each decoder layer when it is final; then those outside of layers.

    Raises ModelError as `check_replaced` does, NumericalError as `require_finite` does, InputError where ``parts`` do
    not fit the model.
    """
    wanted = parts.names(skeleton(model))
    for depth, name, layer in each_layer(model, "quantize", workspace):
        inside = matrices_below(name, wanted)
        require_finite(inside, f"{name}.")
        for path, linear in inside.items():
            replace(layer, path, linear, quantize_linear(linear))
        check_replaced(layer, name, inside, bits)
        yield depth, name, layer
    replace_rest(skeleton(model), wanted, bits, quantize_linear, quantize_table)


def matrices_below(layer_name: str, wanted: Mapping[str, nn.Module]) -> dict[str, nn.Linear]:
    """{path inside the layer: linear layer} of those that are wanted."""
    prefix = f"{layer_name}."
    return {name.removeprefix(prefix): each for name, each in wanted.items() if name.startswith(prefix)}  # type: ignore[misc]


def require_finite(matrices: Mapping[str, nn.Module], prefix: str = "") -> None:
    """Raise NumericalError, with its name, for a matrix that holds NaN or infinity: bitsandbytes rounds it silently."""
    for name, matrix in matrices.items():
        weight = matrix.weight
        assert isinstance(weight, Tensor)
        if weight.numel() and not torch.stack(torch.aminmax(weight.detach())).isfinite().all():
            raise NumericalError(
                f"The matrix {prefix}{name} holds NaN or infinity.\n"
                "Look at the stage before: pruning, or the recovery's learning rate."
            )


def replace(parent: nn.Module, path: str, old: nn.Module, new: nn.Module) -> None:
    """Put ``new`` in the place of ``old``, whose memory is free afterwards, whoever else refers to it."""
    parent.set_submodule(path, new)
    old.to("meta")


def replace_rest(
    model: PreTrainedModel,
    wanted: Mapping[str, nn.Module],
    bits: int,
    quantize_linear: QuantizeLinear,
    quantize_table: QuantizeTable,
) -> None:
    """Replace the embedding and the head, where they are among ``wanted``; a tied head follows its embedding.

    Raises ModelError as `check_replaced` does, NumericalError as `require_finite` does.
    """
    layers = tuple(f"{name}." for name, _ in decoder_layers(model))
    outside = {name: matrix for name, matrix in wanted.items() if not name.startswith(layers)}
    require_finite(outside)
    for matrix in outside.values():
        if isinstance(matrix, nn.Embedding):
            put_embedding(model, quantize_table(matrix))
            matrix.to("meta")
    for name, matrix in outside.items():
        if isinstance(matrix, nn.Linear) and not isinstance(model.get_submodule(name), TiedHead):
            replace(model, name, matrix, quantize_linear(matrix))
    check_replaced(model, type(model).__name__, outside, bits)


def check_replaced(parent: nn.Module, parent_name: str, wanted: Mapping[str, nn.Module], bits: int) -> None:
    """Raise ModelError for matrices at ``wanted`` paths that are not of their shape in ``bits`` bits.

    Whatever the scheme: libraries skip shapes silently.
    """
    left = [path for path, old in wanted.items() if not _is_in(bits, parent.get_submodule(path), old)]
    if left:
        raise ModelError(
            f"These matrices of {parent_name} were not quantised to {bits} bits: {', '.join(left[:5])}"
            f"{f' and {len(left) - 5} more' if len(left) > 5 else ''}.\nThis is a mistake of the quantizer; leave them "
            "out (quantizer.parts), or choose another quantizer."
        )


def _is_in(bits: int, new: nn.Module, old: nn.Module) -> bool:
    if isinstance(new, TiedHead):
        return True  # it holds nothing; the embedding that it computes with is checked itself
    codes, (rows, columns) = new.codes if isinstance(new, GroupedWeight) else new.weight, _shape(old)
    assert isinstance(codes, Tensor)
    packed_bits = 8 * codes.nbytes
    # Rows of codes, or the last of them all, end with whole bytes.
    return (
        codes.dtype in (torch.uint8, torch.int8)
        and _shape(new) == (rows, columns)
        and bits * rows * columns <= packed_bits <= bits * rows * columns + 8 * max(1, rows)
    )


def _shape(matrix: nn.Module) -> tuple[int, int]:
    """Rows and columns; those of a linear layer are asked, as what stands for its weight may have another shape."""
    if isinstance(matrix, nn.Embedding):
        return matrix.num_embeddings, matrix.embedding_dim
    return (matrix.out_features, matrix.in_features) if isinstance(matrix, nn.Linear) else (-1, -1)
