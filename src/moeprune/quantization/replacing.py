"""What quantizers share: every matrix that `quantizable_linears` names is replaced, layer by layer."""

from collections.abc import Callable, Iterator

import torch
from torch import nn

from moeprune.errors import ModelError
from moeprune.models.compressed.quantizable import quantizable_linears
from moeprune.models.layers.streaming import Model, skeleton
from moeprune.models.layers.walk import each_layer
from moeprune.models.layers.workspace import Workspace


@torch.no_grad()
def replaced_layers(
    model: Model, workspace: Workspace, quantized: Callable[[nn.Linear], nn.Module], codes: torch.dtype
) -> Iterator[tuple[int, str, nn.Module]]:
    """Put ``quantized(linear)`` in the place of each matrix, and yield each decoder layer when it is final.

    Raises ModelError when the weight of one is not in ``codes`` afterwards: libraries skip shapes silently.
    """
    linears = quantizable_linears(skeleton(model))
    for depth, name, layer in each_layer(model, "quantize", workspace):
        paths = [path.removeprefix(f"{name}.") for path in linears if path.startswith(f"{name}.")]
        for path in paths:
            linear = linears.pop(f"{name}.{path}")
            layer.set_submodule(path, quantized(linear))
            linear.to("meta")  # its memory is wanted now, whoever else refers to it
        left = [path for path in paths if layer.get_submodule(path).weight.dtype != codes]
        if left:
            raise ModelError(f"These matrices of {name} were not quantised: {', '.join(left[:5])}.")
        yield depth, name, layer
