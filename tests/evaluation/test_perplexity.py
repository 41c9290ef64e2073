"""Perplexity against a loop over tokens; padding and first tokens are not predicted."""

import math

import pytest
import torch

from moeprune.calibration.text import TextFiles
from moeprune.calibration.windows import TokenWindows, windows_of_text
from moeprune.errors import InputError, NumericalError
from moeprune.evaluation.evaluate import Evaluation
from moeprune.evaluation.perplexity import perplexity
from moeprune.evaluation.text_windows import whole_text


@torch.no_grad()
def loop_perplexity(model, windows) -> float:
    """Every window alone, every token alone."""
    losses = []
    for ids, mask in zip(windows.input_ids_NT, windows.mask_NT, strict=True):
        ids = ids[: int(mask.sum())]
        logits = model(input_ids=ids[None]).logits[0].double()
        for position in range(1, len(ids)):
            losses.append(-float(logits[position - 1].log_softmax(0)[ids[position]]))
    return math.exp(sum(losses) / len(losses))


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_perplexity_equals_a_loop_over_tokens(tiny_model, random_windows, batch_size):
    actual = perplexity(tiny_model, random_windows, batch_size, "random")
    assert actual == pytest.approx(loop_perplexity(tiny_model, random_windows), rel=1e-5)


def test_padding_is_not_predicted(tiny_model, random_windows):
    mask = torch.ones_like(random_windows.mask_NT)
    mask[1, 4:] = 0
    mask[3, 7:] = 0
    windows = TokenWindows(random_windows.input_ids_NT, mask)
    assert perplexity(tiny_model, windows, 5, "padded") == pytest.approx(loop_perplexity(tiny_model, windows), rel=1e-5)


def test_a_model_that_knows_nothing_has_the_size_of_the_vocabulary_as_perplexity(tiny_model, random_windows):
    torch.nn.init.zeros_(tiny_model.lm_head.weight)
    assert perplexity(tiny_model, random_windows, 2, "random") == pytest.approx(257, rel=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_a_numerical_error(tiny_model, random_windows, value):
    with torch.no_grad():
        tiny_model.model.norm.weight[0] = value
    with pytest.raises(NumericalError, match="The loss on text 'random' is"):
        perplexity(tiny_model, random_windows, 2, "random")


def test_a_hopeless_model_has_a_large_but_finite_perplexity(tiny_model, random_windows):
    with torch.no_grad():
        tiny_model.lm_head.weight.mul_(1e4)
    assert perplexity(tiny_model, random_windows, 2, "random") == math.exp(700)


def test_evaluation_reports_each_text_and_their_geometric_mean(tiny_model, byte_tokenizer, tmp_path):
    texts = {"letters": "abcdefghij\n" * 20, "digits": "0123456789 " * 20}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    source = TextFiles({name: str(tmp_path / name) for name in texts})
    result = Evaluation(source, windows=3, sequence_length=12, batch_size=2)(tiny_model, byte_tokenizer)
    for name, text in texts.items():
        windows = windows_of_text(byte_tokenizer, text, name=name, count=3, length=12)
        assert result["perplexity"][name] == pytest.approx(loop_perplexity(tiny_model, windows), rel=1e-5)
    assert result["perplexity_tokens"] == {"letters": 3 * 11, "digits": 3 * 11}
    assert result["mean_perplexity"] == pytest.approx(math.sqrt(math.prod(result["perplexity"].values())))
    assert result["tasks"] == {}


def test_the_whole_text_is_measured_as_the_field_does(tiny_model, byte_tokenizer, tmp_path):
    """One stream of tokens cut into windows; of each all but the first token count, and the rest is left out."""
    text = "\n\n".join(f"{number} squared is {number * number}." for number in range(12))
    (tmp_path / "squares").write_text(text)
    source = TextFiles({"squares": str(tmp_path / "squares")})
    result = Evaluation(source, windows=None, sequence_length=32)(tiny_model, byte_tokenizer)
    ids = byte_tokenizer(text)["input_ids"]
    count = len(ids) // 32
    loss = 0.0
    for start in range(0, count * 32, 32):
        window = torch.tensor([ids[start : start + 32]])
        with torch.no_grad():
            loss += float(tiny_model(window, labels=window).loss) * 31
    assert result["perplexity"]["squares"] == pytest.approx(math.exp(loss / (31 * count)), rel=1e-5)
    assert result["perplexity_tokens"] == {"squares": 31 * count}


@pytest.mark.parametrize(("length", "message"), [(1, "leaves nothing to predict"), (1000, "does not fill one window")])
def test_a_text_too_short_for_one_window_is_an_input_error(byte_tokenizer, length, message):
    with pytest.raises(InputError, match=message):
        whole_text(byte_tokenizer, "a short text", name="short", length=length)


def test_no_text_at_all_is_an_input_error(byte_tokenizer):
    with pytest.raises(InputError, match=r"evaluation\.source has no text"):
        Evaluation(TextFiles({}), windows=3, sequence_length=12).check(byte_tokenizer, streams=False)


@pytest.mark.parametrize("batch_size", [0, -4, "many", 2.5, True])
def test_a_batch_size_that_is_no_number_is_an_input_error(batch_size):
    with pytest.raises(InputError, match=f"batch_size={batch_size} is not possible"):
        Evaluation(TextFiles({}), windows=3, sequence_length=12, batch_size=batch_size)


@pytest.mark.parametrize("model_name", ["qwen3_renormalised"])
def test_perplexity_goes_on_with_half_the_batch_where_memory_is_full(tiny_model, random_windows, monkeypatch):
    expected = perplexity(tiny_model, random_windows, 1, "text")
    layer = type(tiny_model.model.layers[0])
    forward, tried = layer.forward, []

    def runs_out(self, hidden_states, *arguments, **settings):
        tried.append(len(hidden_states))
        if len(hidden_states) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(self, hidden_states, *arguments, **settings)

    monkeypatch.setattr(layer, "forward", runs_out)
    assert perplexity(tiny_model, random_windows, "auto", "text") == pytest.approx(expected, rel=1e-6)
    assert tried[:2] == [5, 2]  # all five windows, of the eight that auto would take, and then the half
