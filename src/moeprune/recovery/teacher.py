"""The dense model's predictions for the training windows, computed once and kept on disk: the largest logits only."""

import hashlib
import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from moeprune.errors import InputError, ModelError, NumericalError
from moeprune.models.adapter import decoder_layers
from moeprune.models.layers.calls import logits_after
from moeprune.models.layers.streaming import Model, StreamedModel, skeleton
from moeprune.models.layers.walk import walk_layers
from moeprune.models.layers.workspace import Workspace
from moeprune.training.data import NO_LABEL, LabelledWindows

log = logging.getLogger(__name__)

# Logits that are in memory at once, or those of one window; on a CPU 2^26 took 1.6 times as long.
LOGITS_AT_ONCE = 2**22
BYTES_PER_LOGIT = 8  # a float32 and an int32
DESCRIPTION = "teacher"
FINISHED = "vocabulary.txt"  # written when all is there

# Rows of the windows, places in them, and the logits there [B, P, V].
Predictions = Iterator[tuple[range, Tensor, Tensor]]


def bucketed(logits_MV: Tensor, kept_MK: Tensor) -> Tensor:
    """[M, K + 1]: the logits of K tokens, then ``log sum exp`` of all others.

    Their softmax is the distribution over the K tokens and "any other". Where K is all of V, [M, V] without the others.
    """
    of_kept_MK = logits_MV.gather(1, kept_MK)
    if kept_MK.shape[1] == logits_MV.shape[1]:
        return of_kept_MK
    others_M1 = logits_MV.scatter(1, kept_MK, -torch.inf).logsumexp(dim=1, keepdim=True)
    return torch.cat([of_kept_MK, others_M1], dim=1)


@dataclass(frozen=True)
class TeacherLogits:
    """What a dense model predicts where labels count, a file in ``folder`` per window; plain values.

    A file has, for each of the window's M labels that count, in order: ``kept_MK`` (int32), the tokens of the K largest
    logits, and ``buckets_MB`` (float32), the `bucketed` logits, all divided by the temperature.
    """

    folder: Path
    vocabulary: int

    def read(self, windows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """``(buckets_MB, kept_MK)`` of some windows, one after the other; float32 and int64, on the CPU."""
        files = [load_file(_file(self.folder, window)) for window in windows]
        kept_MK = torch.cat([file["kept_MK"] for file in files]).to(torch.int64)
        return torch.cat([file["buckets_MB"] for file in files]), kept_MK


def teacher_logits(
    windows: LabelledWindows, dense: Callable[[], Model], folder: Path, *, temperature: float, top_k: int
) -> TeacherLogits:
    """What ``dense()`` predicts for the windows, below ``folder``; goes on where an earlier call for the same was cut.

    The hidden states of a streamed model are also there until all is done. ``dense`` is not called where all is there.

    Raises InputError for more logits than the vocabulary or the disk has room for, ModelError for windows with tokens
    that the model does not know, NumericalError where it computes NaN or infinity.
    """
    folder = folder / f"teacher-{_digest(windows, temperature, top_k)}"
    finished = folder / FINISHED
    if finished.exists():
        return TeacherLogits(folder, int(finished.read_text()))
    folder.mkdir(parents=True, exist_ok=True)
    _require_room(windows, top_k, folder)
    model = dense()
    vocabulary = skeleton(model).config.get_text_config().vocab_size
    _require_known(windows, vocabulary, top_k)
    at_once = max(1, LOGITS_AT_ONCE // (windows.labels_NT.shape[1] * vocabulary))
    rows = [range(start, min(start + at_once, len(windows))) for start in range(0, len(windows), at_once)]
    predictions = _streamed if isinstance(model, StreamedModel) else _in_memory
    for some, columns_P, logits_BPV in predictions(model, windows, rows, folder):  # type: ignore[arg-type]
        _write(windows, some, columns_P, logits_BPV / temperature, top_k, folder)
    finished.with_suffix(".partial").write_text(str(vocabulary))
    finished.with_suffix(".partial").rename(finished)
    shutil.rmtree(folder / DESCRIPTION, ignore_errors=True)  # not before: a killed walk would begin anew
    return TeacherLogits(folder, vocabulary)


@torch.no_grad()
def _in_memory(model: PreTrainedModel, windows: LabelledWindows, rows: Sequence[range], folder: Path) -> Predictions:
    left = [some for some in rows if not all(_file(folder, window).exists() for window in some)]
    for some in tqdm(left, desc=DESCRIPTION, unit="batch", initial=len(rows) - len(left), total=len(rows)):
        input_ids_BT, mask_BT = (part.to(model.device) for part in _batch(windows, some))
        columns_P = _columns(windows, some)
        keep = columns_P.to(model.device)
        output = model(input_ids=input_ids_BT, attention_mask=mask_BT, use_cache=False, logits_to_keep=keep)
        yield some, columns_P, output.logits.float()


@torch.no_grad()
def _streamed(model: StreamedModel, windows: LabelledWindows, rows: Sequence[range], folder: Path) -> Predictions:
    batches = [_batch(windows, some) for some in rows]
    workspace = Workspace(folder / DESCRIPTION, model.activations_gib)
    last = len(list(decoder_layers(skeleton(model)))) - 1
    for visit in walk_layers(model, batches, DESCRIPTION, workspace):
        if visit.depth < last:
            continue
        for some, batch, (_, y_TH) in zip(rows, batches, visit.outputs, strict=True):
            columns_P = _columns(windows, some)
            y_BSH = y_TH.unflatten(0, batch[0].shape)
            yield some, columns_P, logits_after(skeleton(model), *batch, y_BSH, columns_P).float()


def _batch(windows: LabelledWindows, rows: range) -> tuple[Tensor, Tensor]:
    """Input ids, and a mask that lets all of them count: padding comes after what counts, so nothing sees it."""
    input_ids_BT = windows.input_ids_NT[rows.start : rows.stop]
    return input_ids_BT, torch.ones_like(input_ids_BT)


def _counts(windows: LabelledWindows, rows: range) -> Tensor:
    """Whether a place predicts a label that counts, bool [B, T - 1]."""
    return windows.labels_NT[rows.start : rows.stop, 1:] != NO_LABEL


def _columns(windows: LabelledWindows, rows: range) -> Tensor:
    """The places that predict a label in any of the windows."""
    return _counts(windows, rows).any(dim=0).nonzero().flatten()


def _write(
    windows: LabelledWindows, rows: range, columns_P: Tensor, logits_BPV: Tensor, top_k: int, folder: Path
) -> None:
    """Keep what belongs to the labels of each window. Raises NumericalError for NaN or infinity."""
    if not torch.isfinite(logits_BPV).all():
        raise NumericalError("The teacher computes NaN or infinity; use another model.compute_dtype.")
    for window, logits_PV, counts_T in zip(rows, logits_BPV, _counts(windows, rows), strict=True):
        logits_MV = logits_PV[counts_T[columns_P]]
        kept_MK = logits_MV.topk(top_k, dim=1).indices
        tensors = {"kept_MK": kept_MK.to("cpu", torch.int32), "buckets_MB": bucketed(logits_MV, kept_MK).cpu()}
        file = _file(folder, window)
        save_file(tensors, file.with_suffix(".partial"))
        file.with_suffix(".partial").rename(file)


def _file(folder: Path, window: int) -> Path:
    return folder / f"{window}.safetensors"


def _digest(windows: LabelledWindows, temperature: float, top_k: int) -> str:
    digest = hashlib.sha256(f"{temperature} {top_k} {tuple(windows.labels_NT.shape)}".encode())
    for tensor in (windows.input_ids_NT, windows.labels_NT):
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _require_room(windows: LabelledWindows, top_k: int, folder: Path) -> None:
    """Log what the logits will take. Raises InputError where the disk has less."""
    needed, free = windows.target_count * (top_k + 1) * BYTES_PER_LOGIT, shutil.disk_usage(folder).free
    written = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    log.info("teacher: %d logits for each of %d labels take %.2f GB", top_k, windows.target_count, needed / 1e9)
    if needed - written > free:
        raise InputError(
            f"The teacher's logits take {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free in {folder.parent}.",
            change="Use fewer windows, a smaller top_k, or another cache_dir.",
        )


def _require_known(windows: LabelledWindows, vocabulary: int, top_k: int) -> None:
    largest = int(windows.input_ids_NT.max())
    if largest >= vocabulary:
        raise ModelError(
            f"The training windows have token {largest}, and the teacher knows {vocabulary} tokens.\n"
            "Use the tokenizer of the model."
        )
    if top_k > vocabulary:
        raise InputError(f"top_k={top_k} is more than the {vocabulary} tokens of the model.", change="Use fewer.")
