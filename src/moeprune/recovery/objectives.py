"""What recovery minimises: the loss on the training text, or also the distance to the dense model's predictions."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moeprune.errors import InputError, ModelError, require_positive
from moeprune.models.layers.streaming import Model
from moeprune.recovery.teacher import TeacherLogits, bucketed, teacher_logits
from moeprune.training.data import NO_LABEL, LabelledWindows


@dataclass(frozen=True)
class LanguageModelling:
    """Cross-entropy ``sum_t -log p(label_t | tokens before it)`` over the labels that count, in natural units."""

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``{"loss", "targets"}`` of a batch: the sum, and the number of labels in it."""
        logits_MV, labels_M = logits_and_labels(model, batch)
        return {"loss": F.cross_entropy(logits_MV, labels_M, reduction="sum"), "targets": _count(labels_M)}


@dataclass(frozen=True)
class Distillation:
    """``a * CE + b * T^2 * KL(teacher || student)``, summed over the labels that count.

    a, b, and T are ``cross_entropy_weight``, ``kl_weight``, and ``temperature``: both distributions are
    ``softmax(logits / T)``, and T^2 keeps the size of the gradient (Hinton et al., 1503.02531, section 2). The teacher
    is the dense model, whose ``top_k`` largest logits are computed once, before training. All other tokens count as one
    outcome more. That gives a lower bound of the KL over the whole vocabulary (by the log sum inequality), which is
    reached where ``top_k`` is the vocabulary.

    Raises InputError for settings that are out of range.
    """

    cross_entropy_weight: float
    kl_weight: float
    temperature: float
    top_k: int

    def __post_init__(self) -> None:
        require_positive(self, "top_k")
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise InputError(f"temperature={self.temperature} is not possible.", change="Use a number like 1 or 2.")
        if not (self.cross_entropy_weight >= 0 and self.kl_weight > 0):
            raise InputError(
                f"Distillation with cross_entropy_weight={self.cross_entropy_weight} and kl_weight={self.kl_weight} "
                "does not distil.",
                change="Use a kl_weight above 0 and a cross_entropy_weight of at least 0.",
            )

    def prepare(self, windows: LabelledWindows, dense: Callable[[], Model], folder: Path) -> "CachedDistillation":
        """The objective with the logits of ``dense()`` for these windows, which are left below ``folder``.

        Goes on where an earlier call for the same windows was killed; ``dense`` is not called where nothing is left.
        """
        teacher = teacher_logits(windows, dense, folder, temperature=self.temperature, top_k=self.top_k)
        return CachedDistillation(self, teacher)


@dataclass(frozen=True)
class CachedDistillation:
    """`Distillation` from logits on disk; plain values, so that it can be sent to other processes."""

    settings: Distillation
    teacher: TeacherLogits

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``{"loss", "targets", "cross_entropy", "kl"}`` of a batch, summed over its labels; both terms unweighted.

        Raises ModelError for a student of another vocabulary than the teacher's.
        """
        logits_MV, labels_M = logits_and_labels(model, batch)
        if logits_MV.shape[1] != self.teacher.vocabulary:
            raise ModelError(
                f"The teacher knows {self.teacher.vocabulary} tokens and the student {logits_MV.shape[1]}: their "
                "predictions cannot be compared.\nUse recovery without distillation."
            )
        cross_entropy = F.cross_entropy(logits_MV, labels_M, reduction="sum")
        teacher_MB, kept_MK = self.teacher.read(batch["index"].tolist())
        student_MB = bucketed(logits_MV / self.settings.temperature, kept_MK.to(logits_MV.device))
        kl = _kl(teacher_MB.to(student_MB), student_MB)
        weighted = self.settings.kl_weight * self.settings.temperature**2 * kl
        loss = self.settings.cross_entropy_weight * cross_entropy + weighted
        return {
            "loss": loss,
            "targets": _count(labels_M),
            "cross_entropy": cross_entropy.detach(),
            "kl": kl.detach(),
        }


def logits_and_labels(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """``(logits_MV, labels_M)``: the M labels that count, window by window, and what predicts each; at least float32.

    A label stands at its own token's place and is predicted one place before. There is no attention mask: padding only
    comes after all that counts.
    """
    targets_BT = batch["labels"][:, 1:]
    counts_BT = targets_BT != NO_LABEL
    # Columns that count in no window need no logits, the largest tensor of all.
    columns_P = counts_BT.any(dim=0).nonzero().flatten()
    output = model(input_ids=batch["input_ids"], use_cache=False, logits_to_keep=columns_P)
    logits_MV = output.logits[counts_BT[:, columns_P]]
    return logits_MV.to(torch.promote_types(logits_MV.dtype, torch.float32)), targets_BT[counts_BT]


def _kl(teacher_MB: Tensor, student_MB: Tensor) -> Tensor:
    """``sum_m KL(softmax(teacher_m) || softmax(student_m))``."""
    log_p_MB, log_q_MB = teacher_MB.log_softmax(dim=1), student_MB.log_softmax(dim=1)
    return F.kl_div(log_q_MB, log_p_MB, reduction="sum", log_target=True)


def _count(labels_M: Tensor) -> Tensor:
    return torch.tensor(len(labels_M), device=labels_M.device)
