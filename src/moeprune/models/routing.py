"""How many experts a token is sent to, where that is not what the checkpoint says."""

from transformers import PreTrainedModel

from moeprune.models.adapter import moe_layers


def send_to_experts(model: PreTrainedModel, experts_per_token: int | None) -> None:
    """Make every router of ``model`` choose so many experts for a token, and its config say so; None changes nothing.

    Gates are what the family makes of as many: renormalised where it renormalises, else the experts that are left out
    take their share with them. What is possible: `moeprune.models.shape.read_shape` and `sent_to_experts`.
    """
    if experts_per_token is None:
        return
    for layer in moe_layers(model):
        layer.router.top_k = experts_per_token
    model.config.get_text_config().num_experts_per_tok = experts_per_token  # ERNIE's config knows its moe_k by it too
