"""lm-eval tasks on a model whose layers come from disk: all requests go through a layer before the next.

Imports lm-eval, which takes seconds.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from moeprune.errors import InputError
from moeprune.evaluation.fitting import with_fitting_batches
from moeprune.evaluation.language_model import FittingLM
from moeprune.evaluation.logits import last_layer_outputs, logits_at
from moeprune.models.layers.streaming import StreamedModel


@dataclass
class _Answer:
    """One continuation: which tokens follow the ones entered, and what the model thinks of it so far."""

    tokens: list[int]
    continuation: int  # how many of them are to be judged, at the end
    log_probability: float = 0.0
    is_greedy: bool = True

    @property
    def positions(self) -> range:
        """Where the judged tokens are predicted."""
        return range(len(self.tokens) - 1 - self.continuation, len(self.tokens) - 1)


class StreamedLM(FittingLM):
    """lm-eval's own adapter of transformers models, tokenisation included, but for how requests are computed."""

    def __init__(
        self, streamed: StreamedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int | str, limit: int
    ) -> None:
        model: Any = streamed.model
        super().__init__(model, tokenizer, batch_size, limit)
        self._streamed = streamed

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """``(log p(continuation | context), whether it is what greedy decoding gives)`` of each request.

        A request is the two texts, then the tokens of both; contexts lose their begin where they are too long. Raises
        InputError for a continuation that is empty, or too long even without a context.
        """
        for _, _, continuation in requests:
            _require_judgeable(len(continuation), self.max_length)
        answers = [
            _Answer((context + continuation)[-(self.max_length + 1) :], len(continuation))
            for _, context, continuation in requests
        ]
        judge = partial(self._judge_all, answers)
        with_fitting_batches(self.batch_size, self._streamed.devices[0], len(answers), "requests", judge)
        return [(answer.log_probability, answer.is_greedy) for answer in answers]

    def _judge_all(self, answers: Sequence[_Answer], size: int) -> bool:
        """Say of each answer what the model thinks of it, ``size`` of them at once."""
        for answer in answers:
            answer.log_probability, answer.is_greedy = 0.0, True
        by_length = sorted(answers, key=lambda answer: -len(answer.tokens))
        groups = [by_length[start : start + size] for start in range(0, len(by_length), size)]
        batches = [_padded(group) for group in groups]
        outputs = last_layer_outputs(self._streamed, batches, "requests")
        for group, batch, y_BSH in zip(groups, batches, outputs, strict=True):
            positions = sorted({position for answer in group for position in answer.positions})
            for some, logits_BPV in logits_at(self._streamed, batch, y_BSH, positions):
                log_p_BPV = F.log_softmax(logits_BPV, dim=-1, dtype=self.softmax_dtype)
                for answer, log_p_PV in zip(group, log_p_BPV, strict=True):
                    _judge(answer, some, log_p_PV)
        return True

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> NoReturn:
        _refuse("scores whole texts")

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> NoReturn:
        _refuse("generates text")


def _require_judgeable(tokens: int, most: int) -> None:
    if not 0 < tokens <= most:
        raise InputError(
            f"The task asks for the probability of {tokens} tokens; the model can give it for 1 to {most}.",
            change="Use another task.",
        )


def _judge(answer: _Answer, positions: Sequence[int], log_p_PV: Tensor) -> None:
    """Add what the judged tokens among those predicted at ``positions`` are worth."""
    rows = [row for row, position in enumerate(positions) if position in answer.positions]
    if rows:
        targets = torch.tensor([answer.tokens[positions[row] + 1] for row in rows], device=log_p_PV.device)
        of_rows = log_p_PV[rows]
        answer.log_probability += float(of_rows.gather(-1, targets.unsqueeze(-1)).sum())
        answer.is_greedy &= bool((of_rows.argmax(dim=-1) == targets).all())


def _padded(answers: Sequence[_Answer]) -> tuple[Tensor, Tensor]:
    """The tokens that are entered, filled up at the end, and which of them count."""
    entered = [torch.tensor(answer.tokens[:-1]) for answer in answers]
    pad = torch.nn.utils.rnn.pad_sequence
    return pad(entered, batch_first=True), pad([torch.ones_like(ids) for ids in entered], batch_first=True)


def _refuse(what: str) -> NoReturn:
    raise InputError(
        f"The task {what}, which would read every layer from the disk for every token.",
        change="Use tasks that choose among answers, or a model that fits in memory: model.streaming=never.",
    )
