"""Targets other than a ratio: bytes, or parameters that a token uses. Needs no torch."""

from moeprune.errors import BudgetError, InputError
from moeprune.models.shape import ExpertShape, ModelSizes


def ratio_for_bytes(
    target: int,
    sizes: ModelSizes,
    shape: ExpertShape,
    *,
    minimum_width: int,
    channels_at_once: int,
    bytes_per_parameter: int = 2,
) -> float:
    """The smallest ratio at which the weights take at most ``target`` bytes, before quantisation.

        bytes(ratio) = bytes_per_parameter * (total - ratio * routed)

    Router rows that go with removed experts are not subtracted, so the result is never larger than asked.
    ``channels_at_once`` is what plans remove multiples of: the alignment, or an allocator's ``channels_at_once``.

    Raises BudgetError with the smallest target possible.
    """
    fixed = bytes_per_parameter * (sizes.total_parameters - sizes.routed_parameters)
    routed = bytes_per_parameter * sizes.routed_parameters
    return _ratio(target, fixed, routed, "bytes", shape, minimum_width, channels_at_once)


def ratio_for_active_parameters(
    target: int, sizes: ModelSizes, shape: ExpertShape, *, minimum_width: int, channels_at_once: int
) -> float:
    """The smallest ratio at which a token uses at most ``target`` parameters.

        active(ratio) = total - routed + (top_k / E) * (1 - ratio) * routed

    counts top-k experts of the mean width over all router rows, as `count_parameters` does.
    It holds where experts that keep nothing keep their router rows, and where none is removed whole; where rows go,
    their tokens meet other experts and more parameters are active than asked.

    Raises BudgetError with the smallest target possible.
    """
    fixed = sizes.total_parameters - sizes.routed_parameters
    # Times E, to stay in whole numbers.
    return _ratio(
        target * shape.experts,
        fixed * shape.experts,
        sizes.routed_parameters * shape.top_k,
        "active parameters",
        shape,
        minimum_width,
        channels_at_once,
        unit=shape.experts,
    )


def _ratio(
    target: int,
    fixed: int,
    routed: int,
    what: str,
    shape: ExpertShape,
    minimum_width: int,
    channels_at_once: int,
    unit: int = 1,
) -> float:
    """1 - kept / all channels, for the most channels of allowed widths with ``fixed + kept * routed / all <= target``.

    Sizes are in 1 / ``unit`` of what is reported.
    """
    if target <= 0:
        raise InputError(f"A target of {target // unit} {what} is not possible.", change="Use a number above 0.")
    channels = shape.layers * shape.experts * shape.width
    kept = _allowed(min(channels, (target - fixed) * channels // routed), shape, minimum_width, channels_at_once)
    least = shape.layers * shape.top_k * minimum_width
    least = -(-least // channels_at_once) * channels_at_once
    if kept < least:
        smallest = -(-(fixed * channels + least * routed) // (channels * unit))
        raise BudgetError(
            f"A target of {target // unit} {what} cannot be met: what is not a routed expert takes {fixed // unit}, "
            f"and {shape.layers} layers x top-{shape.top_k} experts with the fewest channels make it {smallest}.\n"
            f"Use a target of at least {smallest} {what}, or a smaller model.minimum_width."
        )
    return 1 - kept / channels


def _allowed(channels: int, shape: ExpertShape, minimum_width: int, channels_at_once: int) -> int:
    """The most channels, at most as many, that experts of allowed widths can keep."""
    whole = channels // channels_at_once * channels_at_once
    # So many experts can be live, each of which holds no more than its width.
    return min(whole, whole // minimum_width * shape.width)
