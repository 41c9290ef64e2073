"""The shipped multiple-choice tasks."""

import json
from collections import Counter
from importlib.resources import files

import pytest
import yaml
from transformers import AutoTokenizer

from moeprune.embedded import tasks
from moeprune.embedded.corpus import DOMAINS, training_text

RESOURCES = files("moeprune.resources")
TASKS = tuple(tasks.CHANCE_OF_TASK)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(str(RESOURCES / "models" / "tiny_qwen3_moe"))


@pytest.fixture(scope="module")
def items_of():
    return {task: read_items(RESOURCES / "tasks" / f"{task}.jsonl") for task in TASKS}


def read_items(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def held_out_text(task, item):
    """The held-out words that an item repeats, without a closing mark."""
    right = item["choices"][item["answer"]]
    return item["context"].split("\n")[0] if task == "copy" else (item["context"] + right).rstrip(",;:.?!")


@pytest.mark.parametrize("task", TASKS)
def test_items_are_well_formed(task, items_of):
    items = items_of[task]
    assert len(items) >= 1000
    for item in items:
        assert list(item) == ["context", "choices", "answer", "domain"]
        assert len(set(item["choices"])) == len(item["choices"]) == 1 / tasks.CHANCE_OF_TASK[task]
        assert item["answer"] in range(len(item["choices"]))
    assert len({held_out_text(task, item) for item in items}) == len(items)


@pytest.mark.parametrize("task", TASKS)
def test_domains_have_equal_shares_also_among_the_first_items(task, items_of):
    counts = Counter(item["domain"] for item in items_of[task])
    assert counts == dict.fromkeys(tasks.SENTENCE_DOMAINS, tasks.ITEMS_PER_DOMAIN)
    assert min(Counter(item["domain"] for item in items_of[task][:100]).values()) > 20


@pytest.mark.parametrize("task", TASKS)
def test_the_position_of_the_right_answer_is_uniform(task, items_of):
    answers = [item["answer"] for item in items_of[task]]
    chance = tasks.CHANCE_OF_TASK[task]
    standard_error = (chance * (1 - chance) / len(answers)) ** 0.5
    for position in range(round(1 / chance)):
        assert answers.count(position) / len(answers) == pytest.approx(chance, abs=4 * standard_error)


@pytest.mark.parametrize("task", TASKS)
def test_choices_have_equally_many_tokens_after_an_unchanged_context(task, items_of, tokenizer):
    for item in items_of[task]:
        context = tokenizer.encode(item["context"], add_special_tokens=False)
        whole = [tokenizer.encode(item["context"] + choice, add_special_tokens=False) for choice in item["choices"]]
        assert len({len(ids) for ids in whole}) == 1
        assert all(ids[: len(context)] == context for ids in whole)


def test_no_two_tasks_hold_the_same_token_sequence(items_of):
    texts = [
        {item["context"] + choice for item in items_of[task] for choice in item["choices"]} for task in TASKS
    ]  # fmt: skip
    assert len(set().union(*texts)) == sum(len(text) for text in texts)


@pytest.mark.parametrize("task", TASKS)
def test_sampled_items_do_not_occur_in_the_training_text(task, items_of):
    trained = "\n".join(training_text(domain) for domain in DOMAINS).encode()
    for item in items_of[task][::12]:
        assert held_out_text(task, item).encode() not in trained


def test_word_order_exchanges_two_neighbours(items_of):
    for item in items_of["word_order"]:
        assert item["context"] == ""
        first, second = (choice.split(" ") for choice in item["choices"])
        different = [at for at, (a, b) in enumerate(zip(first, second, strict=True)) if a != b]
        assert len(different) == 2 and different[1] - different[0] == 1
        assert sorted(first) == sorted(second)
        assert len(first) in tasks.WORD_ORDER_WORDS


def test_cloze_distractors_are_about_as_frequent(items_of):
    counts = {domain: Counter(tasks.PLAIN_WORD.findall(training_text(domain))) for domain in tasks.SENTENCE_DOMAINS}
    for item in items_of["cloze"]:
        words = [tasks.PLAIN_WORD.match(choice, 1).group() for choice in item["choices"]]
        assert min(len(word) for word in words) >= 4
        assert len({choice[1 + len(word) :] for choice, word in zip(item["choices"], words, strict=True)}) == 1
        right = counts[item["domain"]][words[item["answer"]]]
        for word in words:
            assert right / 1.5 <= counts[item["domain"]][word] <= right * 1.5


def test_copy_goes_on_with_the_passage(items_of):
    for item in items_of["copy"]:
        passage, start = item["context"].split("\n")
        words = [choice.removeprefix(" ") for choice in item["choices"]]
        assert passage.startswith(f"{start} {words[item['answer']]} ")
        assert len(passage.split(" ")) in tasks.COPY_WORDS
        seen = Counter(text.rstrip(",;:.?!") for text in item["context"].split())
        assert len({seen[word] for word in words}) == 1 and seen[words[0]] >= 1


def test_the_shipped_items_are_what_the_code_writes(monkeypatch, tmp_path, items_of, tokenizer):
    monkeypatch.setattr(tasks, "ITEMS_PER_DOMAIN", 3)
    tasks.write_tasks(tmp_path, tokenizer)
    for task in TASKS:
        written = read_items(tmp_path / f"{task}.jsonl")
        assert len(written) == 9
        assert all(item in items_of[task] for item in written)


@pytest.mark.parametrize("task", TASKS)
def test_the_task_file_names_its_fields(task):
    config = yaml.safe_load((RESOURCES / "tasks" / f"{task}.yaml").read_text(encoding="utf-8"))
    assert (config["task"], config["output_type"]) == (task, "multiple_choice")
    assert (config["doc_to_text"], config["doc_to_choice"], config["doc_to_target"]) == ("context", "choices", "answer")
    assert config["dataset_kwargs"]["data_files"] == {"test": f"{task}.jsonl"}
    assert config["target_delimiter"] == ""
