"""Which matrices a quantizer takes; the one place that says so."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from moeprune.errors import InputError, ModelError
from moeprune.models import parts
from moeprune.models.compressed.quantized import SCHEMES
from moeprune.models.parts import part_of_modules
from moeprune.models.runtime.grouped import GroupedWeight, head_is_tied


@dataclass(frozen=True)
class QuantizedParts:
    """Which parts of a model a quantizer takes; `moeprune.models.parts` says what belongs to each.

    Routers, norms, biases, convolutions, and experts that are still fused stay as they are.

    Raises InputError where nothing is chosen.
    """

    routed_experts: bool = True
    shared_experts: bool = True
    attention: bool = True
    dense_mlp: bool = True
    embeddings: bool = False
    head: bool = False

    def __post_init__(self) -> None:
        if not self.chosen:
            raise InputError("quantizer.parts are all false.", change="Set one to true, or use quantizer=none.")

    @property
    def chosen(self) -> frozenset[str]:
        """The parts, by their names in `moeprune.models.parts`."""
        switches = {
            parts.ROUTED: self.routed_experts,
            parts.SHARED: self.shared_experts,
            parts.ATTENTION: self.attention,
            parts.DENSE_MLP: self.dense_mlp,
            parts.EMBEDDINGS: self.embeddings,
            parts.HEAD: self.head,
        }
        return frozenset(part for part, on in switches.items() if on)

    def names(self, model: PreTrainedModel) -> dict[str, nn.Module]:
        """{name: module} of the linear layers and the embedding that are to be quantised; on the meta device too.

        A tied head stands beside the embedding that it is tied to. Raises InputError where only one of both is chosen,
        or where the model has none of the chosen parts; ModelError where the family's embedding or head is of another
        kind, or a matrix is quantised already.
        """
        if self.embeddings != self.head and head_is_tied(model):
            raise InputError(
                f"The head of {type(model).__name__} is its embedding table, so that both have the same bits; "
                f"quantizer.parts.embeddings={self.embeddings} and quantizer.parts.head={self.head} are not possible.",
                change="Set both to true, or both to false.",
            )
        part_of = part_of_modules(model)
        self._require_some(model, part_of)
        chosen = {
            name: module
            for name, module in model.named_modules()
            if type(module) in (nn.Linear, nn.Embedding) and part_of[name] in self.chosen
        }
        for part in {parts.EMBEDDINGS, parts.HEAD} & self.chosen - {part_of[name] for name in chosen}:
            raise ModelError(
                f"quantizer.parts.{part}=True is not possible: in {type(model).__name__} they are of a kind of their "
                "own.\nUse false."
            )
        return chosen

    def _require_some(self, model: PreTrainedModel, part_of: Mapping[str, str]) -> None:
        """Raise InputError where the model has none of the chosen parts, ModelError where one is quantised already."""
        if not self.chosen & set(part_of.values()):
            there = [part for part in parts.PARTS if part in set(part_of.values()) - {parts.ROUTER, parts.OTHER}]
            raise InputError(
                f"{type(model).__name__} has no {', '.join(sorted(self.chosen))}, so that nothing would be quantised.",
                possible=[f"quantizer.parts.{part.replace(' ', '_')}=true" for part in there],
            )
        kinds: tuple[type[nn.Module], ...] = (GroupedWeight, *(scheme.kind for scheme in SCHEMES))
        for name, module in model.named_modules():
            if isinstance(module, kinds) and part_of.get(name) in self.chosen:
                raise ModelError(
                    f"{name} is quantised already.\nQuantise the model that is not, or leave out the "
                    f"{part_of[name]} (quantizer.parts)."
                )
