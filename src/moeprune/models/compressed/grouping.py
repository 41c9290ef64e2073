"""Says in few words which matrices of a model are kept in groups: one entry for all that lie below a module."""

from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

from moeprune.models.runtime.grouped import GroupedWeight

Settings = dict[str, Any]
MATRICES = (nn.Linear, nn.Embedding)


def grouped_in(modules: Mapping[str, nn.Module], layers: Collection[str]) -> dict[str, Settings]:
    """How those of ``modules`` are kept, by names at or below those of ``layers``; the others by their own."""
    entries = {name: module.storage for name, module in modules.items() if isinstance(module, GroupedWeight)}
    matrices = {name: entries.get(name) for name, module in modules.items() if isinstance(module, MATRICES)}
    for layer in layers:
        inside = {name: kept for name, kept in matrices.items() if name.startswith(f"{layer}.")}
        entries = {name: kept for name, kept in entries.items() if name not in inside}
        entries |= common_prefixes(inside, layer)
    return entries


def common_prefixes(settings_of: Mapping[str, Settings | None], top: str) -> dict[str, Settings]:
    """{module name: settings} such that the longest name that a matrix is, or lies below, gives its settings.

    ``settings_of`` are those of all matrices below the module ``top``, None where one is not grouped; no name is then
    found for it. Where the matrices below a module differ, it gets the settings that most have (the first of equals),
    and others their own.
    """
    return _below(top, list(settings_of.items()), None)


def _below(prefix: str, members: list[tuple[str, Settings | None]], inherited: Settings | None) -> dict[str, Settings]:
    kinds = Counter(None if settings is None else tuple(settings.items()) for _, settings in members)
    most = kinds.most_common(1)[0][0] if kinds else None
    entries: dict[str, Settings] = {}
    if None not in kinds and most is not None and dict(most) != inherited:
        inherited = entries[prefix] = dict(most)
    if all(settings == inherited for _, settings in members):
        return entries
    children: dict[str, list[tuple[str, Settings | None]]] = {}
    for name, settings in members:
        child = name.removeprefix(f"{prefix}.").partition(".")[0]
        children.setdefault(f"{prefix}.{child}", []).append((name, settings))
    for child, inside in children.items():
        entries |= _below(child, inside, inherited)
    return entries
