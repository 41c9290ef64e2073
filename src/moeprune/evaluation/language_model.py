"""lm-eval's adapter of transformers models, with batches that fit in memory. Imports lm-eval, which takes seconds."""

import os
from collections.abc import Callable, Sequence
from typing import Any

from lm_eval.models.huggingface import HFLM
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moeprune.errors import InputError
from moeprune.evaluation.fitting import first_batch_size, half_of, try_out

# So many batches are asked for at a time: no more is computed again where one does not fit.
BATCHES_AT_ONCE = 16
DEFAULT_GENERATED_TOKENS = 256  # lm-eval's own, where a task does not say


class FittingLM(HFLM):
    """lm-eval's adapter, but for the batch size: where a batch does not fit in memory, it goes on with half of it.

    lm-eval's own ``batch_size="auto"`` tries the model's longest context before each task that generates, prints, and
    ends with an error where a later batch does not fit, so it is not used.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int | str, limit: int
    ) -> None:
        size = first_batch_size(batch_size, model.device)
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=size, max_length=limit)

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """As lm-eval's, but its bars heed TQDM_DISABLE."""
        return super().loglikelihood(requests, disable_tqdm or _bars_are_off())

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """``(log p(continuation | context), whether it is what greedy decoding gives)`` of each request."""
        compute = super()._loglikelihood_tokens
        return self._longest_first(requests, _tokens_of, compute, disable_tqdm)

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """What the model writes after each request's context. Raises InputError where its context is too short."""
        self._require_room([request.args[1] for request in requests])
        compute = super().generate_until
        is_quiet = disable_tqdm or _bars_are_off()
        return self._longest_first(requests, lambda request: len(request.args[0]), compute, is_quiet)

    def _longest_first(
        self, requests: Sequence[Any], length: Callable[[Any], int], compute: Callable[..., list[Any]], is_quiet: bool
    ) -> list[Any]:
        """``compute(requests)`` in their order. The longest are computed first: what cannot fit is soon known."""
        order = sorted(range(len(requests)), key=lambda row: -length(requests[row]))
        answers: dict[int, Any] = {}
        with tqdm(total=len(order), desc="requests", disable=is_quiet) as bar:
            while len(answers) < len(order):
                rows = order[len(answers) : len(answers) + BATCHES_AT_ONCE * self.batch_size]
                some = [requests[row] for row in rows]
                found = try_out(lambda some=some: compute(some, disable_tqdm=True))  # type: ignore[misc]
                if found is None:
                    self.batch_size_per_gpu = half_of(min(self.batch_size, len(rows)), "requests")
                    continue
                answers |= zip(rows, found, strict=True)
                bar.update(len(rows))
        return [answers[row] for row in range(len(requests))]

    def _require_room(self, settings: Sequence[dict[str, Any]]) -> None:
        most = max((each.get("max_gen_toks", DEFAULT_GENERATED_TOKENS) for each in settings), default=0)
        if most >= self.max_length:
            raise InputError(
                f"The task lets a model write up to {most} tokens; this one has room for {self.max_length} in all.",
                change="Leave the task out, or use a model with a longer context.",
            )


def _tokens_of(request: tuple[tuple[str, str], list[int], list[int]]) -> int:
    _, context, continuation = request
    return len(context) + len(continuation)


def _bars_are_off() -> bool:
    return bool(os.environ.get("TQDM_DISABLE"))
