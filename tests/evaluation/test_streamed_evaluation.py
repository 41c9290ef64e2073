"""A model whose layers come from disk gets the numbers of one in memory."""

import pytest
import torch
from families import FAMILIES, build_family, save_as_the_hub_does
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM

from moeprune.calibration.windows import TokenWindows
from moeprune.errors import InputError
from moeprune.evaluation import logits
from moeprune.evaluation.perplexity import perplexity
from moeprune.evaluation.streamed_tasks import StreamedLM
from moeprune.evaluation.tasks import shipped_tasks, task_accuracies
from moeprune.models.layers.streaming import StreamedModel, stream_dense

CPU = (torch.device("cpu"),)

one_model = pytest.mark.parametrize("model_name", ["deepseek_v2"])


@pytest.fixture
def windows(random_windows) -> TokenWindows:
    """Five windows of 11 tokens, the last four of which are padding in one."""
    mask_NT = torch.ones_like(random_windows.mask_NT)
    mask_NT[3, 7:] = 0
    return TokenWindows(random_windows.input_ids_NT, mask_NT)


@pytest.fixture
def streamed(tiny_checkpoint) -> StreamedModel:
    return stream_dense(tiny_checkpoint, torch.float32, CPU)


def test_perplexity_is_the_same_bit_for_bit(streamed, tiny_model, windows):
    assert perplexity(streamed, windows, 2, "text") == perplexity(tiny_model, windows, 2, "text")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gets_the_loss_that_transformers_computes(family, windows, tmp_path):
    save_as_the_hub_does(build_family(family, torch.float32), tmp_path)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    labels_NT = windows.input_ids_NT.masked_fill(windows.mask_NT == 0, -100)
    with torch.no_grad():
        expected = whole(windows.input_ids_NT, attention_mask=windows.mask_NT, labels=labels_NT).loss.exp()
    streamed = stream_dense(tmp_path, torch.float32, CPU)
    assert perplexity(streamed, windows, 5, "text") == pytest.approx(float(expected), rel=1e-5)


@one_model
def test_memory_for_hidden_states_changes_no_bit(streamed, tiny_checkpoint, windows):
    """Two batches of two windows fit, then all layers are read again for the last window."""
    limit = 2 * 2 * 11 * 32 * 4 / 2**30
    limited = stream_dense(tiny_checkpoint, torch.float32, CPU, activations_gib=limit)
    read, fill = [], limited._fill
    limited._fill = lambda depth, device: (read.append(depth), fill(depth, device))
    assert perplexity(limited, windows, 2, "text") == perplexity(streamed, windows, 2, "text")
    assert read == [0, 1, 2, 0, 1, 2]


@one_model
def test_logits_of_a_few_tokens_at_a_time_give_the_same_loss(streamed, windows, monkeypatch):
    whole = perplexity(streamed, windows, 2, "text")
    monkeypatch.setattr(logits, "LOGITS_AT_ONCE", 1)
    assert perplexity(streamed, windows, 2, "text") == pytest.approx(whole, rel=1e-6)


def test_tasks_have_the_same_accuracies(streamed, tiny_model, byte_tokenizer):
    arguments = byte_tokenizer, shipped_tasks(), 6, 4
    assert task_accuracies(streamed, *arguments) == task_accuracies(tiny_model, *arguments)


REQUESTS = [
    ("the cat sat on the", " mat"),
    ("the cat sat on the", " hat and then it slept"),
    ("a much longer beginning, which has many more tokens than the other ones", "."),
    ("same", "a"),
    ("same", "b"),
    ("sam", "ea"),
    ("", "no context"),
    ("x" * 600, "too long"),
]


@pytest.mark.parametrize("at_once", [1, 2**26], ids=["token by token", "all at once"])
def test_log_probabilities_are_those_of_the_model_in_memory(streamed, tiny_model, byte_tokenizer, at_once, monkeypatch):
    monkeypatch.setattr(logits, "LOGITS_AT_ONCE", at_once)
    requests = [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(REQUESTS)]
    answers = StreamedLM(streamed, byte_tokenizer, batch_size=3, limit=512).loglikelihood(requests, disable_tqdm=True)
    # Its cache of logits mistakes "same" + "a" for "sam" + "ea".
    in_memory = HFLM(pretrained=tiny_model, tokenizer=byte_tokenizer, batch_size=1, max_length=512, logits_cache=False)
    expected = in_memory.loglikelihood(requests, disable_tqdm=True)
    for (value, greedy), (expected_value, expected_greedy) in zip(answers, expected, strict=True):
        assert value == pytest.approx(expected_value, rel=1e-4, abs=1e-4)
        assert greedy == expected_greedy


def test_greedy_continuations_are_recognised(streamed, tiny_model, byte_tokenizer):
    context = byte_tokenizer.encode("the cat")
    with torch.no_grad():
        ids = tiny_model.generate(torch.tensor([context]), max_new_tokens=3, do_sample=False, eos_token_id=None)
    continuation = ids[0, len(context) :].tolist()
    other = [*continuation[:-1], (continuation[-1] + 1) % 257]
    requests = [(("", ""), context, continuation), (("", ""), context, other)]
    answers = StreamedLM(streamed, byte_tokenizer, batch_size=2, limit=512)._loglikelihood_tokens(requests)
    assert [greedy for _, greedy in answers] == [True, False]


@one_model
@pytest.mark.parametrize("kind", ["generate_until", "loglikelihood_rolling"])
def test_what_would_read_all_layers_for_each_token_is_an_input_error(streamed, byte_tokenizer, kind):
    model = StreamedLM(streamed, byte_tokenizer, batch_size=2, limit=512)
    with pytest.raises(InputError, match=r"model\.streaming=never"):
        getattr(model, kind)([])


@one_model
@pytest.mark.parametrize("tokens", [0, 9], ids=["nothing", "more than the model can take"])
def test_what_cannot_be_judged_is_an_input_error(streamed, byte_tokenizer, tokens):
    """lm-eval's own adapter refuses it too."""
    model = StreamedLM(streamed, byte_tokenizer, batch_size=2, limit=8)
    assert model._loglikelihood_tokens([(("", ""), [1], [2] * 8)])
    with pytest.raises(InputError, match=f"probability of {tokens} tokens.*1 to 8"):
        model._loglikelihood_tokens([(("", ""), [1], [2]), (("", ""), [1], [2] * tokens)])
