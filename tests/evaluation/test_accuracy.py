"""lm-eval tasks on a model in memory: those that ship with the package run without a network."""

import json
import math
from importlib.resources import files

import pytest
import torch

from moeprune.evaluation import tasks
from moeprune.evaluation.task_choice import TaskChoice
from moeprune.evaluation.tasks import shipped_tasks, task_accuracies, task_settings

ITEMS = 5

# For what does not depend on the family.
one_model = pytest.mark.parametrize("model_name", ["qwen3_renormalised"])


@torch.no_grad()
def accuracy_by_hand(model, tokenizer, task) -> float:
    """Share of items whose right choice has the largest sum of log-probabilities after its context."""
    lines = (files("moeprune.resources") / "tasks" / f"{task}.jsonl").read_text().splitlines()[:ITEMS]
    right = 0
    for item in map(json.loads, lines):
        context = tokenizer(item["context"])["input_ids"] or [tokenizer.eos_token_id]
        sums = []
        for choice in item["choices"]:
            ids = torch.tensor(context + tokenizer(choice)["input_ids"])
            log_probability = model(ids[None]).logits[0].log_softmax(dim=-1)
            sums.append(float(sum(log_probability[at - 1, ids[at]] for at in range(len(context), len(ids)))))
        right += sums.index(max(sums)) == item["answer"]
    return right / len(lines)


def test_some_tasks_ship_with_the_package():
    assert {"word_order", "cloze", "copy"} <= set(shipped_tasks())


@one_model
def test_shipped_tasks_run_offline_and_agree_with_counting_by_hand(tiny_model, byte_tokenizer):
    tasks = shipped_tasks()
    results = task_accuracies(tiny_model, byte_tokenizer, tasks, items=ITEMS, batch_size=2)
    assert list(results) == tasks
    for task, result in results.items():
        share = accuracy_by_hand(tiny_model, byte_tokenizer, task)
        assert result["accuracy"] == pytest.approx(share)
        assert result["n"] == ITEMS
        # The sample standard deviation of right and wrong answers over the root of their number.
        assert result["stderr"] == pytest.approx(math.sqrt(share * (1 - share) / (ITEMS - 1)))


@one_model
def test_no_tasks_give_no_results(tiny_model, byte_tokenizer):
    assert task_accuracies(tiny_model, byte_tokenizer, [], items=None, batch_size=2) == {}


def test_a_shipped_task_is_known_by_the_content_of_its_files(monkeypatch, tmp_path):
    """A result that is kept is not that of another text of the examples; a task of lm-eval has its version."""
    for file in tasks._tasks_folder().iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    monkeypatch.setattr(tasks, "_tasks_folder", lambda: tmp_path)
    before = {name: task_settings(TaskChoice(name), 8) for name in ("cloze", "copy", "piqa")}
    with (tmp_path / "cloze.jsonl").open("a") as file:
        file.write("\n")
    after = {name: task_settings(TaskChoice(name), 8) for name in before}
    assert {name for name in before if before[name] != after[name]} == {"cloze"}
    assert "files" not in after["piqa"]
