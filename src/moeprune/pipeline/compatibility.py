"""Which scorers, allocators and surgeries go together, told before anything is computed.

Plug-ins say what they need and give by class variables; one that says nothing is taken to fit, and refuses by itself.
"""

from moeprune.errors import InputError


def check_compatible(scorer: object, allocator: object, surgery: object) -> None:
    """Raise InputError where one choice needs what another does not give."""

    def said(plug_in: object, fact: str, otherwise: bool) -> bool:
        return bool(getattr(plug_in, fact, otherwise))

    names = [type(plug_in).__name__ for plug_in in (scorer, allocator, surgery)]
    if said(allocator, "needs_channel_scores", False) and not said(scorer, "scores_channels", True):
        raise InputError(
            f"{names[1]} needs a score for every channel; {names[0]} ranks whole experts only.",
            change="Use allocator=whole_experts, or a channel scorer such as scorer=attribution.",
        )
    if said(allocator, "merges", False) and not said(scorer, "gives_distances", False):
        raise InputError(
            f"{names[1]} merges experts by distances between them; {names[0]} gives none.",
            change="Use scorer=hc_smoe or scorer=m_smoe. An own scorer that gives distance_LEE says so by the class "
            "variable gives_distances = True.",
        )
    if said(allocator, "merges", False) and said(surgery, "refuses_merging", False):
        raise InputError(
            f"{names[1]} merges experts; {names[2]} makes up for channels that are removed, and merging removes none.",
            change="Use surgery=none.",
        )
    if said(surgery, "needs_all_channels", False) and not said(allocator, "keeps_all_channels", False):
        raise InputError(
            f"{names[2]} zeroes single weights of experts that keep all channels; {names[1]} removes channels.",
            change="Use allocator=keep_all, or method=wanda_unstructured.",
        )
    if said(allocator, "keeps_all_channels", False) and not said(surgery, "needs_all_channels", False):
        raise InputError(
            f"{names[1]} removes nothing and leaves the work to the surgery; {names[2]} does none of it.",
            change="Use surgery=wanda_unstructured, or another allocator.",
        )
