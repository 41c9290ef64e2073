"""Takes all batches through one decoder layer before the next: one layer's weights at a time, hidden states kept."""

import copy
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal, TypeVar

import torch
from bitsandbytes.nn import Params4bit
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from moeprune.errors import InputError
from moeprune.models.adapter import decoder_layers
from moeprune.models.layers.calls import layer_calls
from moeprune.models.layers.streaming import Model, devices_of, drop_tensors, resident, skeleton
from moeprune.models.layers.workspace import IN_MEMORY, HiddenStates, Workspace

Batches = Sequence[tuple[Tensor, Tensor]]
Outputs = Iterator[tuple[Tensor, Tensor]]
Result = TypeVar("Result")


@dataclass(frozen=True)
class Share:
    """What one device computes of a layer: ``layer``, a replica of it there, and its ``outputs`` for some batches.

    ``batches`` are their indices among all batches.
    """

    layer: nn.Module
    batches: range
    outputs: Outputs


@dataclass(frozen=True)
class LayerVisit:
    """One decoder layer with its weights, and what it computes.

    ``outputs`` runs ``layer`` on one batch after the other and gives ``(valid_T, y_TH)``: which of its T = B * S tokens
    are no padding, and what the layer computed. ``shares`` offers the same batches split over the devices, see
    `on_every_share`; the first share's layer is ``layer`` itself. A batch comes once, from whichever is asked first.
    """

    depth: int
    name: str
    layer: nn.Module
    outputs: Outputs
    shares: tuple[Share, ...]


def walk_layers(
    model: Model,
    batches: Batches,
    description: str,
    workspace: Workspace = IN_MEMORY,
    propagate: Literal["dense", "changed"] = "dense",
) -> Iterator[LayerVisit]:
    """Visit each decoder layer in turn, beginning at the workspace's depth.

    ``batches`` are ``(input_ids [B, S], attention_mask [B, S])``. Batches that the caller does not ask for are run
    before the next layer comes. With ``propagate="dense"`` a layer whose outputs are used up may be changed without
    consequence for the later ones, and what the layers compute is what the model computes, bit for bit. With "changed"
    each layer is run again when the caller asks for the next one, and the later layers see what it computes then.

    Held between layers are the hidden states of all batches, in the workspace. Masks and positions are made by the
    model itself, anew for each batch and layer, for the price of an embedding look-up.

    Raises InputError when the workspace belongs to another walk.
    """
    layers = list(decoder_layers(skeleton(model)))
    workspace.begin(_described(skeleton(model), batches, description, propagate))
    steps = _Steps(skeleton(model), batches, HiddenStates(workspace))
    start, end = workspace.depth, len(layers)
    for depth in tqdm(range(start, end), desc=description, unit="layer", initial=start, total=end):
        name, layer = layers[depth]
        last = depth == end - 1
        with resident(model, depth, layer):
            run = _LayerRun(steps, depth, layer, devices_of(model), keep=propagate == "dense" and not last)
            yield LayerVisit(depth, name, layer, run.outputs(), run.shares)
            if not last and propagate == "changed":
                run.drop_replicas()
                run = _LayerRun(steps, depth, layer, devices_of(model), keep=True)
            if not last:
                on_every_share(run.shares, lambda share: run_through(share.outputs))
            run.drop_replicas()
        steps.hidden.finish_layer()


def each_layer(
    model: Model, description: str, workspace: Workspace = IN_MEMORY
) -> Iterator[tuple[int, str, nn.Module]]:
    """``(depth, name, layer)`` of each decoder layer with its weights, one at a time, from the workspace's depth on.

    Nothing is run. Raises InputError when the workspace belongs to another walk.
    """
    layers = list(decoder_layers(skeleton(model)))
    workspace.begin(_described(skeleton(model), (), description, ""))
    start = workspace.depth
    for depth in tqdm(range(start, len(layers)), desc=description, unit="layer", initial=start, total=len(layers)):
        name, layer = layers[depth]
        with resident(model, depth, layer):
            yield depth, name, layer
        workspace.finish(depth + 1)


def run_through(layers: Iterable[object]) -> None:
    """Take every layer, for what happens to it on the way."""
    for _ in layers:
        pass


def on_every_share(shares: Sequence[Share], work: Callable[[Share], Result]) -> list[Result]:
    """``work(share)`` for each share, in a thread of its own where there are several; results in the shares' order."""
    if len(shares) == 1:
        return [work(shares[0])]
    with ThreadPoolExecutor(len(shares)) as threads:
        return list(threads.map(work, shares))


def _described(model: PreTrainedModel, batches: Batches, description: str, propagate: str) -> Iterator[object]:
    """What tells one walk from another: the model's shapes, the tokens, and what the walk is for."""
    yield description, propagate
    tensors = [*model.named_parameters(), *model.named_buffers()]
    yield [(name, tuple(tensor.shape)) for name, tensor in tensors]
    for input_ids_BS, mask_BS in batches:
        yield tuple(input_ids_BS.shape)
        yield input_ids_BS.cpu().contiguous().numpy().tobytes()
        yield mask_BS.cpu().contiguous().numpy().tobytes()


class _LayerRun:
    """Runs one layer, on every device, on the batches that are left."""

    def __init__(
        self, steps: "_Steps", depth: int, layer: nn.Module, devices: Sequence[torch.device], keep: bool
    ) -> None:
        self._steps, self._depth, self._layer, self._keep = steps, depth, layer, keep
        count, parts = len(steps.batches), len(devices)
        batches = [range(count * part // parts, count * (part + 1) // parts) for part in range(parts)]
        self._left = [deque(of_part) for of_part in batches]
        self._replicas = [_replica(layer, device) for device in devices[1:]]
        self.shares = tuple(
            Share(replica, batches[part], self._outputs_of(replica, devices[part], self._left[part]))
            for part, replica in enumerate([layer, *self._replicas])
        )
        self._device = devices[0]

    def outputs(self) -> Outputs:
        """All batches that are left, on the layer itself."""
        return chain.from_iterable(self._outputs_of(self._layer, self._device, left) for left in self._left)

    def drop_replicas(self) -> None:
        """Free the memory of the replicas, whoever still refers to them."""
        for replica in self._replicas:
            drop_tensors(replica.modules())

    @torch.no_grad()
    def _outputs_of(self, layer: nn.Module, device: torch.device, left: deque[int]) -> Outputs:
        while left:
            batch = left.popleft()
            valid_T, y_BSH = self._steps.run(self._depth, layer, device, batch)
            if self._keep:
                self._steps.hidden.write(batch, y_BSH)
            yield valid_T, y_BSH.flatten(0, 1)


class _Steps:
    """Runs single layers on single batches as the model would."""

    def __init__(self, model: PreTrainedModel, batches: Batches, hidden: HiddenStates) -> None:
        self.batches, self.hidden = batches, hidden
        self._model = model
        self._calling = threading.Lock()

    def run(self, depth: int, layer: nn.Module, device: torch.device, batch: int) -> tuple[Tensor, Tensor]:
        """``(valid_T, y_BSH)`` on ``device``."""
        input_ids_BS, mask_BS = self.batches[batch]
        with self._calling:
            calls = layer_calls(self._model, input_ids_BS, mask_BS)
        arguments, keywords = _moved(calls[depth], device)
        hidden_BSH = arguments[0] if depth == 0 else self.hidden.read(batch).to(device)
        if hidden_BSH.shape != arguments[0].shape:
            raise InputError(
                f"The workspace holds hidden states of shape {tuple(hidden_BSH.shape)} for a batch of shape "
                f"{tuple(arguments[0].shape)}.",
                change="Use an empty folder.",
            )
        y_BSH = layer(hidden_BSH, *arguments[1:], **keywords)
        return mask_BS.flatten().bool().to(device), y_BSH


def _replica(layer: nn.Module, device: torch.device) -> nn.Module:
    """A copy of the layer on ``device``; where that is the layer's own, both share their tensors."""
    tensors = [*layer.parameters(), *layer.buffers()]
    return copy.deepcopy(layer, {id(tensor): _on(tensor, device) for tensor in tensors})


def _on(tensor: Tensor, device: torch.device) -> Tensor:
    # The library moves the scales of the original along.
    moved = (copy.deepcopy(tensor) if isinstance(tensor, Params4bit) else tensor).to(device)
    if isinstance(tensor, nn.Parameter) and not isinstance(moved, nn.Parameter):
        return nn.Parameter(moved, requires_grad=False)
    return moved


def _moved(value: Any, device: torch.device) -> Any:
    """The same nested tuples, lists and dictionaries with their tensors on ``device``."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, (tuple, list)):
        return type(value)(_moved(part, device) for part in value)
    if isinstance(value, dict):
        return {name: _moved(part, device) for name, part in value.items()}
    return value
