"""Where a run may stop before its end: to warm the cache with one job before many want the same stages."""

from collections.abc import Sequence

from moeprune.errors import InputError

# What a user says -> the last stage that the run then has.
STAGE_OF = {
    "calibration": "calibration", "statistics": "statistics", "score": "scores", "plan": "plan", "prune": "pruned",
    "recover": "recovered", "quantize": "quantized",
}  # fmt: skip
GROUP_OF = {"recover": "recovery", "quantize": "quantizer"}  # what must be chosen for the stage to be there


def check_until(until: str, chosen: Sequence[str]) -> None:
    """Raise InputError where a run in which the groups ``chosen`` have a choice cannot stop after ``until``."""
    if until not in STAGE_OF:
        raise InputError(f"until={until} is not possible.", possible=STAGE_OF, given=until)
    group = GROUP_OF.get(until)
    if group is not None and group not in chosen:
        raise InputError(f"until={until} is not possible with {group}=none.", change=f"Choose a {group}.")
