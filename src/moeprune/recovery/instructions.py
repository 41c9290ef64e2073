"""Instruction data: prompts with their answers, in windows of one length."""

import logging
import random
from collections import Counter
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from moeprune.calibration.records import RecordSource
from moeprune.errors import InputError, require_positive
from moeprune.recovery.packing import Example, Packing
from moeprune.recovery.prompts import Template, Turn
from moeprune.training.data import LabelledWindows

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class InstructionData:
    """At most ``windows`` windows (None: no limit) of ``sequence_length`` tokens, filled with records in an order that
    ``seed`` chooses.

    An example is the tokenizer's begin token, prompt, answer, and end token; a chat template writes its own. Labels are
    the answer and its end, with ``train_on_prompt`` the prompt too. What is longer than a window loses its end. With
    ``pack`` several examples share a window, see `Packing`.

    Raises InputError for settings that are out of range.
    """

    records: RecordSource
    template: Template
    windows: int | None
    sequence_length: int
    seed: int
    pack: bool = True
    train_on_prompt: bool = False

    def __post_init__(self) -> None:
        require_positive(self, "sequence_length", *(["windows"] if self.windows is not None else []))

    def check(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raise InputError for what is bound to fail."""
        replace(self, windows=1)._filled(tokenizer)

    def __call__(self, tokenizer: PreTrainedTokenizerBase) -> LabelledWindows:
        """The windows. Raises InputError for records that are missing, have other fields, or have no answers."""
        windows, seen = self._filled(tokenizer)
        self._report(windows, seen)
        return windows

    def _filled(self, tokenizer: PreTrainedTokenizerBase) -> tuple[LabelledWindows, Counter[str]]:
        """The windows, and how many records were used or why not."""
        begin, end = _begin_and_end(tokenizer)
        records = self.records.read()
        packing = Packing(self.sequence_length, most=self.windows, pack=self.pack, begin=begin)
        seen: Counter[str] = Counter()
        for index in random.Random(self.seed).sample(range(len(records)), len(records)):
            turn = self.template(records[index], tokenizer)
            example = None if turn is None else self._example(turn, tokenizer, begin, end)
            if turn is None:
                seen["without an answer"] += 1
            elif example is None:
                seen["with a prompt that fills a window"] += 1
            elif not packing.add(example):
                break
            else:
                seen["used"] += 1
        if not packing.windows:
            counts = ", ".join(f"{count} {what}" for what, count in seen.items())
            raise InputError(
                f"No record can be trained on: {counts}.",
                change="Check the template's fields, or use a larger sequence_length.",
            )
        padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else end
        return packing.labelled_windows(padding), seen

    def _example(self, turn: Turn, tokenizer: PreTrainedTokenizerBase, begin: int, end: int) -> Example | None:
        """None where no label is left in the window."""
        # Encoded as one text, as a model meets it; so where the answer begins is known by characters.
        text = turn.prompt + turn.answer
        _require_whole_characters(text)
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        token_ids = list(encoded["input_ids"])
        first_target = sum(stop <= len(turn.prompt) for _, stop in encoded["offset_mapping"])
        if not turn.ends:
            token_ids, first_target = [begin, *token_ids, end], first_target + 1
        if self.train_on_prompt:
            first_target = 1
        # Nothing predicts the first token of an example.
        example = Example(token_ids[: self.sequence_length], max(first_target, 1))
        return example if example.first_target < len(example.token_ids) else None

    def _report(self, windows: LabelledWindows, seen: Counter[str]) -> None:
        counts = ", ".join(f"{count} {what}" for what, count in sorted(seen.items()))
        log.info(
            "training data: %d windows of %d tokens, of which %.1f%% are labels; records: %s",
            len(windows), self.sequence_length, 100 * windows.target_count / windows.labels_NT.numel(), counts,
        )  # fmt: skip
        if self.windows is not None and len(windows) < self.windows:
            log.warning("the records fill %d windows; %d were asked for", len(windows), self.windows)


def _require_whole_characters(text: str) -> None:
    r"""Raise InputError for half a surrogate pair, which JSON can write (``\ud83d``) and tokenizers cannot read."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"A record of the training data has half a character, {text[error.start]!a}, after "
            f"{text[max(0, error.start - 40) : error.start]!r}.",
            change="Write the file again with whole characters, or leave the record out.",
        ) from None


def _begin_and_end(tokenizer: PreTrainedTokenizerBase) -> tuple[int, int]:
    """The tokens around an example; where there is no begin token the end token serves, as in calibration windows.

    Raises InputError for a tokenizer that has no end token, or does not say where its tokens begin.
    """
    end = tokenizer.eos_token_id
    if end is None or not tokenizer.is_fast:
        raise InputError(
            "The model's tokenizer has no end token, or does not say which characters its tokens stand for.",
            change="Use a checkpoint with a tokenizer.json and an eos_token, or training_data=text_file.",
        )
    return (end if tokenizer.bos_token_id is None else tokenizer.bos_token_id), end
