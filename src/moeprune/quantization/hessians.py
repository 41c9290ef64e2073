"""Gathers ``H = sum_t x_t x_t^T`` over the calibration tokens, for what enters each linear layer of a decoder layer.

Axis letters: I inputs of a layer, N rows of them, B windows of S tokens, T = B * S, H hidden size, K experts per token.
"""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moeprune.errors import ModelError
from moeprune.models.layers.walk import Batches, LayerVisit, Share, on_every_share
from moeprune.models.runtime.ragged import RaggedExperts


@dataclass
class InputSum:
    """``sum_II`` of x x^T over ``tokens`` inputs x of the linear layers ``paths``, which all get the same ones.

    In float32, or in the inputs' dtype where that is finer: the sums of one layer of Qwen3-30B-A3B's shape would take
    5.1 GB in float64, and the damping that GPTQ adds is far above what float32 rounds.
    """

    paths: list[str]
    sum_II: Tensor
    tokens: int = 0

    def add(self, x_NI: Tensor) -> None:
        exact_NI = x_NI.to(self.sum_II.dtype)
        self.sum_II.addmm_(exact_NI.T, exact_NI)
        self.tokens += len(exact_NI)


@torch.no_grad()
def input_sums(visit: LayerVisit, paths: Collection[str], batches: Batches) -> list[InputSum]:
    """The sums for the linear layers ``paths`` of the visited layer; runs all ``batches`` of the visit.

    Layers of one module that are called with the same tensor share a sum, as gate and up projections do, or queries,
    keys and values. Layers that no token reached have none. Padding never counts: it is kept from the routed experts,
    so what the layer gives for it in this run is not what the model gives.

    Raises ModelError where padding cannot be told from tokens in what enters a layer.
    """
    sums, *others = on_every_share(visit.shares, lambda share: _gathered(share, paths, batches))
    device = next(visit.layer.parameters()).device
    for part in others:
        for path, other in part.items():
            if path in sums:
                sums[path].sum_II += other.sum_II.to(device)
                sums[path].tokens += other.tokens
            else:
                sums[path] = InputSum(other.paths, other.sum_II.to(device), other.tokens)
    return list(sums.values())


def _gathered(share: Share, paths: Collection[str], batches: Batches) -> dict[str, InputSum]:
    """The part of `input_sums` that the batches of one device give, by the first of the layers that share a sum."""
    gathering = _Gathering()
    with gathering.watching(share.layer, paths):
        for batch in share.batches:
            gathering.begin(batches[batch][1])
            next(share.outputs)
    return gathering.sums


class _Gathering:
    """Sums, and what is known of the batch that runs."""

    def __init__(self) -> None:
        self.sums: dict[str, InputSum] = {}
        self._first_of: dict[str, str] = {}  # of the layers that share its sum
        # What entered layers of a module, and which was the first; kept, else another tensor could get its id.
        self._entered: dict[tuple[int, str], tuple[Tensor, str]] = {}
        self._valid_T: Tensor | None = None

    def begin(self, mask_BS: Tensor) -> None:
        """Another batch comes; ``mask_BS`` is 0 for padding."""
        self._entered.clear()
        self._valid_T = None if mask_BS.all() else mask_BS.flatten().bool()

    @contextmanager
    def watching(self, layer: nn.Module, paths: Collection[str]) -> Iterator[None]:
        """Within the context, what enters the linear layers is added, and padding does not enter routed experts."""
        routed = {path: part for path, part in layer.named_modules() if isinstance(part, RaggedExperts)}
        hooks = [part.register_forward_pre_hook(self._without_padding) for part in routed.values()]
        hooks += [part.register_forward_hook(self._with_padding) for part in routed.values()]
        for path in paths:
            among_routed = path.startswith(tuple(f"{experts}." for experts in routed))

            def note(_module: nn.Module, inputs: tuple, path: str = path, among_routed: bool = among_routed) -> None:
                self._note(path, inputs[0], among_routed)

            hooks.append(layer.get_submodule(path).register_forward_pre_hook(note))
        try:
            yield
        finally:
            self._entered.clear()
            for hook in hooks:
                hook.remove()

    def _note(self, path: str, inputs: Tensor, among_routed: bool) -> None:
        _, first = self._entered.setdefault((id(inputs), path.rpartition(".")[0]), (inputs, path))
        if self._first_of.setdefault(path, first) != first:
            raise ModelError(f"{path} and {first} get the same inputs in some batches and others in others.")
        if first == path:
            x_NI = inputs.flatten(0, -2) if among_routed else self._valid_rows(path, inputs)
            dtype = torch.promote_types(x_NI.dtype, torch.float32)
            if path not in self.sums:
                self.sums[path] = InputSum([path], x_NI.new_zeros(x_NI.shape[1], x_NI.shape[1], dtype=dtype))
            self.sums[path].add(x_NI)
        elif path not in self.sums[first].paths:
            self.sums[first].paths.append(path)

    def _valid_rows(self, path: str, inputs: Tensor) -> Tensor:
        x_NI = inputs.flatten(0, -2)
        if self._valid_T is None:
            return x_NI
        if len(x_NI) != len(self._valid_T):
            raise ModelError(
                f"{path} gets {len(x_NI)} rows of inputs for {len(self._valid_T)} tokens, some of which are padding.\n"
                "Calibrate with windows without padding."
            )
        return x_NI[self._valid_T.to(x_NI.device)]

    def _without_padding(self, _experts: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if self._valid_T is None:
            return None
        return tuple(each[self._valid_T.to(each.device)] for each in inputs)

    def _with_padding(self, _experts: nn.Module, _inputs: tuple[Tensor, ...], output_NH: Tensor) -> Tensor | None:
        if self._valid_T is None:
            return None
        output_TH = output_NH.new_zeros(len(self._valid_T), output_NH.shape[1])
        output_TH[self._valid_T.to(output_NH.device)] = output_NH
        return output_TH
