"""Which scorers, allocators and surgeries go together and on which models, told before anything is computed.

Plug-ins say what they need and give by class variables; one that says nothing is taken to fit, and refuses by itself.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from moeprune.allocation.budget import Budget
from moeprune.errors import InputError
from moeprune.models.shape import ExpertShape
from moeprune.surgery.prune import REMOVE_ROW


def check_compatible(scorer: object, allocator: object, surgery: object) -> None:
    """Raise InputError where one choice needs what another does not give."""
    names = [type(plug_in).__name__ for plug_in in (scorer, allocator, surgery)]
    if _said(allocator, "needs_channel_scores", False) and not _said(scorer, "scores_channels", True):
        raise InputError(
            f"{names[1]} needs a score for every channel; {names[0]} ranks whole experts only.",
            change="Use allocator=whole_experts, or a channel scorer such as scorer=attribution.",
        )
    if _said(allocator, "merges", False) and not _said(scorer, "gives_distances", False):
        raise InputError(
            f"{names[1]} merges experts by distances between them; {names[0]} gives none.",
            change="Use scorer=hc_smoe or scorer=m_smoe. An own scorer that gives distance_LEE says so by the class "
            "variable gives_distances = True.",
        )
    if _said(allocator, "merges", False) and _said(surgery, "refuses_merging", False):
        raise InputError(
            f"{names[1]} merges experts; {names[2]} makes up for channels that are removed, and merging removes none.",
            change="Use surgery=none.",
        )
    if _said(surgery, "needs_all_channels", False) and not _said(allocator, "keeps_all_channels", False):
        raise InputError(
            f"{names[2]} zeroes single weights of experts that keep all channels; {names[1]} removes channels.",
            change="Use allocator=keep_all, or method=wanda_unstructured.",
        )
    if _said(allocator, "keeps_all_channels", False) and not _said(surgery, "needs_all_channels", False):
        raise InputError(
            f"{names[1]} removes nothing and leaves the work to the surgery; {names[2]} does none of it.",
            change="Use surgery=wanda_unstructured, or another allocator.",
        )


def check_passes(passes: Iterable[object], shape: ExpertShape, computation_dtype: torch.dtype) -> None:
    """Raise InputError where a pass cannot work on a model of this shape, computed in this precision."""
    for wanted in passes:
        name = type(wanted).__name__
        if shape.routes_by_group and _said(wanted, "needs_removable_rows", False):
            raise InputError(
                f"{name} tries layers without the router rows of some experts, but this model's routers choose among "
                "groups of experts, which cannot shrink.",
                change="Use scorer=reap with surgery=keep_rows to remove whole experts, or scorer=attribution with "
                "allocator=uniform to remove channels.",
            )
        if computation_dtype == torch.float16 and _said(wanted, "refuses_float16", False):
            raise InputError(
                f"{name} takes gradients of the block_local loss, which are too small for float16.",
                change="Use model.compute_dtype=bfloat16 or float32.",
            )


def check_whole_model(scorer: object, streamed: bool) -> None:
    """Raise InputError for a scorer whose gradients go through the whole model, where its layers stay on disk."""
    if streamed:
        raise InputError(
            f"{type(scorer).__name__} takes gradients through the whole model, and this one does not fit in memory.",
            change="Use a scorer that goes layer by layer, such as scorer=attribution or scorer=camera, or, where the "
            "model and its gradients do fit, model.streaming=never.",
        )


def check_lengths(asked: Mapping[str, int], context: int | None) -> None:
    """Raise InputError for a sequence length, by the name of its setting, beyond the model's ``context``."""
    for setting, length in asked.items():
        if context is not None and length > context:
            raise InputError(
                f"{setting}={length}, but the model was made for at most {context} tokens at once.",
                change=f"Use {setting}={context} or less.",
            )


def check_router_rows(allocator: Any, surgery: object, shape: ExpertShape, budget: Budget) -> None:
    """Raise InputError where experts are bound to go with router rows that cannot.

    An allocator that ``removes_whole_experts`` says by ``check(budget)`` how many. Where plans of others happen to
    empty an expert, only the cut can tell.
    """
    rows_go = getattr(surgery, "empty_experts", None) == REMOVE_ROW
    if not (shape.routes_by_group and rows_go and _said(allocator, "removes_whole_experts", False)):
        return
    if allocator.check(budget) > 0:
        raise InputError(
            f"With ratio={budget.ratio} {type(allocator).__name__} removes whole experts and {type(surgery).__name__} "
            "their router rows, but this model's routers choose among groups of experts, which cannot shrink.",
            change="Keep the rows, surgery=keep_rows, or remove channels of every expert, allocator=uniform with a "
            "channel scorer such as scorer=attribution.",
        )


def _said(plug_in: object, fact: str, otherwise: bool) -> bool:
    return bool(getattr(plug_in, fact, otherwise))
