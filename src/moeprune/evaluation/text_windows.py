"""The windows of a text that perplexity is measured on."""

import torch
from transformers import PreTrainedTokenizerBase

from moeprune.calibration.windows import TokenWindows, windows_of_text
from moeprune.errors import InputError


def evaluation_windows(
    tokenizer: PreTrainedTokenizerBase, text: str, *, name: str, count: int | None, length: int
) -> TokenWindows:
    """The first ``count`` windows of ``length`` tokens, each behind the tokenizer's begin token; or, with None, the
    whole text as the field measures it (`whole_text`).

    Raises InputError when the text does not fill one window, or a window is too short to predict anything.
    """
    if count is None:
        return whole_text(tokenizer, text, name=name, length=length)
    return windows_of_text(tokenizer, text, name=name, count=count, length=length)


def whole_text(tokenizer: PreTrainedTokenizerBase, text: str, *, name: str, length: int) -> TokenWindows:
    """A text of n tokens as floor(n / length) windows, one after the other, with nothing put before each.

    The protocol of GPTQ (arXiv 2210.17323; with length 2048), by which perplexities on WikiText2 are published: the
    text is tokenised at once, as the tokenizer does by itself, all but the first token of each window are predicted,
    and the rest of the text, less than one window, is left out. Raises InputError.
    """
    if length < 2:
        raise InputError(f"sequence_length={length} leaves nothing to predict.", change="Use 128 or more.")
    tokens = tokenizer(text, verbose=False)["input_ids"]
    count = len(tokens) // length
    if count == 0:
        raise InputError(
            f"The text {name!r} does not fill one window of {length} tokens; it has {len(tokens)}.",
            change="Use a longer text or a smaller sequence_length.",
        )
    input_ids_NT = torch.tensor(tokens[: count * length]).view(count, length)
    return TokenWindows(input_ids_NT, torch.ones_like(input_ids_NT))
