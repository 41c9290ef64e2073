"""The ways in which a checkpoint holds quantised linear layers, and which tensors belong to one."""

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

from bitsandbytes.nn import Linear4bit, Linear8bitLt
from torch import nn

from moeprune.models.compressed.eight_bit import eight_bit_modules, empty_eight_bit_linear, fill_eight_bit_linear
from moeprune.models.compressed.four_bit import empty_four_bit_linear, fill_four_bit_linear, four_bit_modules


@dataclass(frozen=True)
class Scheme:
    """One way: the type of such layers; which modules tensor names say are kept so; a layer without weights, and how it
    is given its stored tensors."""

    kind: type[nn.Linear]
    modules: Callable[[Iterable[str]], set[str]]
    empty: Callable[..., nn.Linear]
    fill: Callable[..., None]


SCHEMES = (
    Scheme(Linear4bit, four_bit_modules, empty_four_bit_linear, fill_four_bit_linear),
    Scheme(Linear8bitLt, eight_bit_modules, empty_eight_bit_linear, fill_eight_bit_linear),
)


def quantized_modules(tensor_names: Iterable[str]) -> dict[str, Scheme]:
    """{module: how it is kept} of the quantised ones, by the names of a checkpoint's tensors."""
    names = list(tensor_names)
    return {module: scheme for scheme in SCHEMES for module in scheme.modules(names)}


def module_of(tensor_name: str, modules: Collection[str]) -> str | None:
    """Which of ``modules`` a tensor belongs to: ``a.b`` for ``a.b.bias`` and ``a.b.weight.absmax``; else None."""
    module = tensor_name.rpartition(".weight.")[0] or tensor_name.rpartition(".")[0]
    return module if module in modules else None
