"""``hydra.sweeper.grids``: a sweep that is the union of several grids, for tables whose rows are no product."""

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override

from moeprune.errors import InputError

EXAMPLE = "[{ratio: 0}, {ratio: '0.25,0.5', method: 'reap,mone'}]"


def jobs_of_grids(
    params: Mapping[str, Any], grids: object, words: Sequence[str], loader: ConfigLoader | None = None
) -> list[list[str]]:
    """The overrides of each job: of the first grid, then of those after it.

    A grid is every combination of the values of ``params``, of its own settings, and of ``words``, the command line;
    of two values for one setting the later of these counts. A job whose settings another one has already is left out.
    Without ``grids`` (null) there is one, without settings of its own.

    Raises InputError for grids that are no list of mappings to values, or for a value that no grid can have.
    """
    parser = OverridesParser.create(config_loader=loader)
    jobs: dict[frozenset[str], list[str]] = {}
    for grid in _checked(grids):
        settings = [f"{key}={value}" for key, value in [*params.items(), *grid.items()]]
        for job in _combinations(parser.parse_overrides([*settings, *words])):
            jobs.setdefault(frozenset(job), job)
    return list(jobs.values())


def _checked(grids: object) -> list[dict[str, str]]:
    """The grids with their values as text, as the command line has them."""
    if grids is None:
        return [{}]
    if not isinstance(grids, Sequence) or isinstance(grids, str) or not grids:
        raise InputError(f"hydra.sweeper.grids={grids} is no list of grids.", change=f"Give one such as {EXAMPLE}.")
    found = []
    for number, grid in enumerate(grids):
        if not isinstance(grid, Mapping):
            raise InputError(
                f"hydra.sweeper.grids[{number}]={grid} is no mapping of settings to values.",
                change=f"Give a list such as {EXAMPLE}.",
            )
        found.append({str(key): _text(value, f"hydra.sweeper.grids[{number}]: {key}") for key, value in grid.items()})
    return found


def _text(value: object, name: str) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, (int, float)) or (isinstance(value, str) and value):
        return str(value)
    raise InputError(
        f"{name}: {value!r} is not possible.",
        change="Give a value, or several in one text with commas between them: '0.25,0.5'.",
    )


def _combinations(overrides: Sequence[Override]) -> list[list[str]]:
    values: dict[str, list[str]] = {}
    for override in overrides:
        key = override.get_key_element()
        if not override.is_sweep_override():
            values[key] = [f"{key}={override.get_value_element_as_str()}"]
        elif override.is_discrete_sweep():
            values[key] = [f"{key}={value}" for value in override.sweep_string_iterator()]
        else:
            raise InputError(
                f"{override.input_line} is no list of values, which a grid needs.",
                change=f"Give values, such as {key}=0.25,0.5, or search with hydra/sweeper=optuna.",
            )
    return [list(job) for job in product(*values.values())]
