"""Whether stock engines can express what was pruned: one width and one number of experts for all layers."""

from dataclasses import dataclass

from moeprune.errors import InputError
from moeprune.export.checkpoint import PrunedCheckpoint

# Families whose config has one width for routed and shared experts.
SHARED_AS_WIDE = ("llama4_text",)


@dataclass(frozen=True)
class StockShape:
    """Router rows of every MoE layer, and channels of every expert."""

    experts: int
    width: int


def stock_shape(checkpoint: PrunedCheckpoint, *, pad: bool) -> StockShape:
    """The one shape that all layers have, or with ``pad`` get by zeros up to the widest expert.

    Raises InputError for what no such shape can express, and names the setting whose result it could.
    """
    _check_weights(checkpoint)
    rows = {name: checkpoint.row_widths(name) for name in checkpoint.pruned["widths"]}
    counts = sorted({len(widths) for widths in rows.values()})
    if len(counts) > 1:
        raise InputError(
            f"The layers have from {counts[0]} to {counts[-1]} experts; stock engines know one number for all layers.",
            change="Prune with allocator=whole_experts, which removes as many from every layer, or allocator=uniform, "
            "which removes none; or keep the router rows (surgery=keep_rows) and export with pad=true.",
        )
    widths = sorted({width for layer in rows.values() for width in layer})
    if len(widths) > 1 and not pad:
        raise InputError(
            f"The experts have {len(widths)} widths from {widths[0]} to {widths[-1]} channels; stock engines know one "
            "width for all experts of all layers.",
            change="Prune with allocator=uniform and a ratio that leaves every expert the same whole blocks of "
            "channels, or with allocator=whole_experts; or export with pad=true, which fills up with zeros: the same "
            "outputs, but the size and speed of the widest expert.",
        )
    return StockShape(counts[0], _with_shared_experts(checkpoint, widths[-1], pad))


def _with_shared_experts(checkpoint: PrunedCheckpoint, width: int, pad: bool) -> int:
    """The width; of families whose shared experts are as wide as the routed ones, theirs, which was not pruned."""
    if checkpoint.family not in SHARED_AS_WIDE:
        return width
    dense = int(checkpoint.family_config["intermediate_size"])
    if width == dense:
        return width
    if not pad:
        raise InputError(
            f"{checkpoint.family} has one width for routed ({width} channels) and shared experts ({dense}).",
            change="Prune with allocator=whole_experts, or export with pad=true.",
        )
    return dense


def _check_weights(checkpoint: PrunedCheckpoint) -> None:
    if checkpoint.quantized:
        raise InputError(
            f"The checkpoint in {checkpoint.folder} is quantised; engines quantise in formats of their own.",
            change="Export one that was made with quantizer=none.",
        )
    if checkpoint.pruned["biased"]:
        raise InputError(
            "The checkpoint adds a constant output per expert, which stock engines do not know.",
            change="Prune with surgery=none, keep_rows or refit.",
        )
