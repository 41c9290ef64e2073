"""In which order a model is pruned, recovered and quantised, and what each order asks of the choices."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moeprune.errors import InputError
from moeprune.models.expected import read_config

PRUNE, RECOVER, QUANTIZE = "prune", "recover", "quantize"
ORDERS = ((PRUNE, RECOVER, QUANTIZE), (PRUNE, QUANTIZE, RECOVER))


def check_order(order: Sequence[str]) -> None:
    """Raise InputError for an order of stages that is none of `ORDERS`."""
    if tuple(order) not in ORDERS:
        possible = [f"order=[{','.join(stages)}]" for stages in ORDERS]
        raise InputError(f"order=[{','.join(map(str, order))}] is not possible.", possible=possible)


def check_after_pruning(chosen: Sequence[tuple[str, Any]], dense: Path) -> None:
    """Raise InputError where a recovery or quantizer cannot work at its place in the order, or on the model ``dense``.

    ``chosen`` are (stage, plug-in) in order. Needs the model's config.json only.
    """
    check_places(chosen)
    parts = getattr(dict(chosen).get(QUANTIZE), "parts", None)
    if parts is not None and read_config(dense).tie_word_embeddings and parts.embeddings != parts.head:
        raise InputError(
            "Embeddings and output head of this model are one matrix; quantizer.parts asks to quantise one of them.",
            change="Set quantizer.parts.embeddings and quantizer.parts.head both to true, or both to false.",
        )


def check_places(chosen: Sequence[tuple[str, Any]]) -> None:
    """Raise InputError where a recovery or quantizer cannot work at its place in the order, whatever the model."""
    stages = [stage for stage, _ in chosen]
    of_stage = dict(chosen)
    if stages == [RECOVER, QUANTIZE] and not getattr(of_stage[RECOVER], "merges", True):
        raise InputError(
            "recovery.merge=false keeps adapters beside the model, and a model with adapters is not quantised.",
            change="Use recovery.merge=null, or order=[prune,quantize,recover].",
        )
    if stages == [QUANTIZE, RECOVER]:
        check = getattr(of_stage[RECOVER], "check_quantized_base", None)
        if check is not None:
            check()
