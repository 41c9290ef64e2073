"""What becomes of a trained model when it is stored: it is rounded to the checkpoint's precision."""

from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moeprune.errors import ModelError
from moeprune.models.compressed.files import never_rounded, stored_precision
from moeprune.training.data import LabelledWindows

# How far the logits of the model as it is stored may be from those of the model as it was trained: root mean square,
# relative. Routers compute in float32 at most, and a token that rounding sends to another expert moves by far more.
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3, torch.float16: 0.02, torch.bfloat16: 0.1}


def precisions(model: nn.Module) -> dict[str, torch.dtype]:
    """{name: precision} of the parameters of a model without adapters, but for codes of quantised ones."""
    return {name: value.dtype for name, value in model.named_parameters() if value.is_floating_point()}


@torch.no_grad()
def round_as_stored(model: PreTrainedModel, dtype: torch.dtype, computing: Mapping[str, torch.dtype]) -> None:
    """Round the parameters, in place, as a checkpoint in ``dtype`` does, then to what they were before training.

    ``computing`` are the `precisions` then; adapters take the most frequent one.
    """
    kept, ((usual, _),) = never_rounded(model, dtype), Counter(computing.values()).most_common(1)
    for name, value in model.named_parameters():
        if value.is_floating_point():
            own = computing.get(name.replace(".base_layer", ""), usual)
            value.data = value.data.to(stored_precision(name, dtype, kept)).to(own)


@torch.no_grad()
def logits_of(model: PreTrainedModel, windows: LabelledWindows) -> Tensor:
    """float64 [N, T, V], window by window; of a model in 16 bits also where what trained is in float32."""
    with torch.autocast(model.device.type, model.dtype, enabled=model.dtype.itemsize == 2):
        batches = (ids_T.unsqueeze(0).to(model.device) for ids_T in windows.input_ids_NT)
        return torch.cat([model(input_ids=ids_1T, use_cache=False).logits for ids_1T in batches]).double()


def difference(trained_NTV: Tensor, stored_NTV: Tensor) -> dict[str, float]:
    """How far the logits moved: ``||stored - trained|| / ||trained||``, and the largest of all."""
    moved_NTV = stored_NTV - trained_NTV
    return {
        "stored_difference": float(moved_NTV.norm() / trained_NTV.norm()),
        "stored_max_difference": float(moved_NTV.abs().max()),
    }


def check_stored(moved: float, computing: torch.dtype, stored: torch.dtype) -> None:
    """Raise ModelError where the logits moved by more than the coarser of the two precisions explains."""
    coarser = max((computing, stored), key=lambda dtype: torch.finfo(dtype).eps)
    if not moved <= TOLERANCE[coarser]:
        raise ModelError(
            f"Storing the recovered model in {stored} changes its logits by {moved:.2g} of their size; "
            f"{TOLERANCE[coarser]} is allowed.\nUse recovery.merge=false, or a finer model.dtype."
        )
