"""The paper's nine tasks, by lm-eval's own definitions, on data sets of the same schema in small."""

import logging
import os
import random
import sys

import evaluate as metrics_library
import harness_data
import pytest
import torch
from lm_eval.api.instance import Instance

from moeprune.errors import InputError
from moeprune.evaluation.generated_code import PERMISSION
from moeprune.evaluation.language_model import FittingLM
from moeprune.evaluation.task_choice import TaskChoice
from moeprune.evaluation.tasks import check_tasks, task_result, task_score

one_model = pytest.mark.parametrize("model_name", ["deepseek_v2"])

CHOICES = {"arc_challenge": 3, "arc_easy": 3, "hellaswag": 2, "piqa": 2, "boolq": 2, "winogrande": 3}


@pytest.fixture(autouse=True)
def hub(monkeypatch):
    monkeypatch.setattr("datasets.load_dataset", harness_data.load_dataset)


@pytest.fixture
def code_metric(tmp_path, monkeypatch):
    """The metric that runs code, in the working directory."""
    (tmp_path / "code_eval").mkdir()
    (tmp_path / "code_eval" / "code_eval.py").write_text(harness_data.CODE_EVAL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(metrics_library.config, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(metrics_library.config, "HF_METRICS_CACHE", str(tmp_path / "metrics"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield
    for name in [name for name in sys.modules if name.startswith(("evaluate_modules", "lm_eval.tasks.humaneval"))]:
        del sys.modules[name]


def score(model, tokenizer, task, batch_size=2, items=None, allowed=False, **settings):
    choice = TaskChoice(task, **settings)
    return task_score(choice, task_result(lambda: model, tokenizer, choice, items, batch_size, allowed))


@torch.no_grad()
def log_probability(model, tokenizer, context, continuation) -> float:
    """log p(continuation | context), a sum over the continuation's tokens."""
    before, after = tokenizer(context)["input_ids"], tokenizer(continuation)["input_ids"]
    log_p_TV = model(torch.tensor([before + after])).logits[0].double().log_softmax(dim=-1)
    return sum(float(log_p_TV[len(before) - 1 + place, token]) for place, token in enumerate(after))


@one_model
@pytest.mark.parametrize("task", CHOICES)
def test_tasks_of_choices_give_an_accuracy(task, tiny_model, byte_tokenizer):
    found = score(tiny_model, byte_tokenizer, task)
    assert found["n"] == CHOICES[task]
    assert found["accuracy"] * found["n"] == pytest.approx(round(found["accuracy"] * found["n"]))
    assert (found["metric"], found["fewshot"]) == ("acc,none", 0)


@one_model
@pytest.mark.parametrize("metric", ["acc", "acc_norm"])
def test_arc_is_what_the_log_probabilities_say(metric, tiny_model, byte_tokenizer):
    right = 0
    for item in harness_data.ARC:
        choices = item["choices"]["text"]
        context = f"Question: {item['question']}\nAnswer:"
        sums = [log_probability(tiny_model, byte_tokenizer, context, f" {choice}") for choice in choices]
        if metric == "acc_norm":
            sums = [value / len(choice) for value, choice in zip(sums, choices, strict=True)]
        right += "ABCD"[sums.index(max(sums))] == item["answerKey"]
    found = score(tiny_model, byte_tokenizer, "arc_easy", metric=metric)
    assert found["accuracy"] == pytest.approx(right / len(harness_data.ARC))
    assert found["metric"] == f"{metric},none"


@one_model
def test_winogrande_judges_the_end_of_the_sentence_after_each_option(tiny_model, byte_tokenizer):
    right = 0
    for item in harness_data.WINOGRANDE:
        before, after = item["sentence"].split("_")
        sums = [
            log_probability(tiny_model, byte_tokenizer, before + item[option], " " + after.strip())
            for option in ("option1", "option2")
        ]
        right += str(sums.index(max(sums)) + 1) == item["answer"]
    found = score(tiny_model, byte_tokenizer, "winogrande")
    assert found["accuracy"] == pytest.approx(right / len(harness_data.WINOGRANDE))


@one_model
def test_mmlu_is_the_mean_over_all_items_of_57_subjects(tiny_model, byte_tokenizer):
    found = score(tiny_model, byte_tokenizer, "mmlu", items=1, batch_size=32)
    assert found["n"] == 57
    assert 0 <= found["accuracy"] <= 1
    assert (found["metric"], found["fewshot"]) == ("acc,none", 0)


@one_model
def test_choices_that_are_shuffled_come_in_the_same_order_in_every_run(tiny_model, byte_tokenizer, monkeypatch):
    seen = []
    compute = FittingLM.loglikelihood

    def noting(self, requests, disable_tqdm=False):
        seen.append([request.args for request in requests])
        return compute(self, requests, disable_tqdm)

    monkeypatch.setattr(FittingLM, "loglikelihood", noting)
    drawn = []
    for seed in (1, 2):
        random.seed(seed)
        score(tiny_model, byte_tokenizer, "gpqa_main_zeroshot")
        drawn.append(random.random())
    assert seen[0] == seen[1]
    assert drawn == [random.Random(seed).random() for seed in (1, 2)]  # as if nothing had been drawn


@one_model
def test_gsm8k_shows_five_examples_and_reads_the_answer_from_what_is_written(tiny_model, byte_tokenizer, monkeypatch):
    seen = []

    def answers(self, requests, disable_tqdm=False):
        seen.extend(request.args[0] for request in requests)
        return [" 3 times 2.\n#### 6\n", " It is 6, 9 or 10"]

    monkeypatch.setattr("lm_eval.models.huggingface.HFLM.generate_until", answers)
    assert score(tiny_model, byte_tokenizer, "gsm8k")["accuracy"] == 0.5
    assert all(context.count("Question:") == 6 and context.endswith("\nAnswer:") for context in seen)
    flexible = score(tiny_model, byte_tokenizer, "gsm8k", fewshot=1, metric="exact_match,flexible-extract")
    assert (flexible["accuracy"], flexible["fewshot"], flexible["n"]) == (0.5, 1, 2)
    assert seen[-1].count("Question:") == 2


@one_model
def test_gsm8k_generates_with_the_model_itself(tiny_model, byte_tokenizer):
    torch.nn.init.zeros_(tiny_model.lm_head.weight)  # ends every answer at once
    found = score(tiny_model, byte_tokenizer, "gsm8k")
    assert found == {"accuracy": 0.0, "stderr": 0.0, "n": 2, "metric": "exact_match,strict-match", "fewshot": 5}


@one_model
def test_humaneval_runs_what_the_model_wrote_and_takes_the_permission_back(tiny_model, byte_tokenizer, code_metric):
    """The model writes nothing, so the prompt that is a whole function passes and the other fails."""
    torch.nn.init.zeros_(tiny_model.lm_head.weight)
    tiny_model.config.max_position_embeddings = 2048
    found = score(tiny_model, byte_tokenizer, "humaneval", allowed=True)
    assert (found["accuracy"], found["n"], found["metric"], found["fewshot"]) == (0.5, 2, "pass@1,create_test", 0)
    assert PERMISSION not in os.environ


@one_model
def test_generated_code_does_not_run_without_permission(tiny_model, byte_tokenizer):
    for refuse in (
        lambda: check_tasks([TaskChoice("humaneval")], run_generated_code=False, streams=False),
        lambda: score(tiny_model, byte_tokenizer, "humaneval"),
    ):
        with pytest.raises(InputError, match=r"(?s)runs the Python code.*evaluation\.run_generated_code=true"):
            refuse()


@one_model
def test_a_task_that_writes_more_than_the_model_has_room_for_is_an_input_error(tiny_model, byte_tokenizer, code_metric):
    with pytest.raises(InputError, match="up to 1024 tokens; this one has room for 512"):
        score(tiny_model, byte_tokenizer, "humaneval", allowed=True)
    assert PERMISSION not in os.environ


@pytest.fixture
def small_memory(tiny_model, monkeypatch):
    """A GPU that holds one sequence."""
    forward = type(tiny_model).forward

    def runs_out(self, input_ids=None, **settings):
        if len(input_ids) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(self, input_ids, **settings)

    return lambda: monkeypatch.setattr(type(tiny_model), "forward", runs_out)


@one_model
def test_results_do_not_depend_on_the_batch_size_and_survive_a_full_memory(
    tiny_model, byte_tokenizer, small_memory, caplog
):
    def result(batch_size):
        return task_result(lambda: tiny_model, byte_tokenizer, TaskChoice("hellaswag"), None, batch_size)

    expected = result(1)
    assert result("auto") == expected
    small_memory()
    with caplog.at_level(logging.INFO):
        assert result(5) == expected
    halved = [record.message for record in caplog.records if "do not fit" in record.message]
    assert halved == [
        "requests: 5 sequences at once do not fit in memory, going on with 2",
        "requests: 2 sequences at once do not fit in memory, going on with 1",
    ]
    caplog.clear()
    with caplog.at_level(logging.INFO):
        assert result(500) == expected
    halved = [record.message for record in caplog.records if "do not fit" in record.message]
    assert halved[0] == "requests: 8 sequences at once do not fit in memory, going on with 4"  # not 250


@one_model
def test_text_is_generated_greedily_whatever_the_batch_and_the_memory(tiny_model, byte_tokenizer, small_memory):
    contexts = ["the cat", "a much longer beginning", "so"]
    settings = {"until": ["\n\n\n"], "max_gen_toks": 5, "do_sample": False}
    requests = [Instance("generate_until", {}, (context, settings), row) for row, context in enumerate(contexts)]
    expected = []
    for context in contexts:
        ids = torch.tensor([byte_tokenizer(context)["input_ids"]])
        with torch.no_grad():
            for _ in range(5):
                ids = torch.cat([ids, tiny_model(ids).logits[:, -1:].argmax(dim=-1)], dim=1)
        expected.append(byte_tokenizer.decode(ids[0, -5:]))
    assert FittingLM(tiny_model, byte_tokenizer, 3, limit=512).generate_until(requests) == expected
    small_memory()
    assert FittingLM(tiny_model, byte_tokenizer, 3, limit=512).generate_until(requests) == expected


@one_model
def test_a_sequence_that_does_not_fit_by_itself_is_an_input_error(tiny_model, byte_tokenizer, monkeypatch):
    def never_fits(*_inputs, **_settings):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(type(tiny_model), "forward", never_fits)
    with pytest.raises(InputError, match=r"not even one sequence at a time fits.*\n.*model\.streaming=always"):
        score(tiny_model, byte_tokenizer, "piqa")
