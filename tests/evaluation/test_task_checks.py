"""What is wrong with a task is told before a model is loaded."""

import pytest
from datasets.exceptions import DatasetNotFoundError

from moeprune.errors import InputError
from moeprune.evaluation.task_checks import load_harness_task
from moeprune.evaluation.task_choice import TaskChoice, task_choices
from moeprune.evaluation.task_files import find_task, known_tasks
from moeprune.evaluation.tasks import check_tasks, task_score

PAPER = ("arc_challenge", "arc_easy", "hellaswag", "piqa", "boolq", "winogrande", "mmlu", "gsm8k", "humaneval")


def refused(*choices: TaskChoice) -> str:
    with pytest.raises(InputError) as refusal:
        check_tasks(choices, run_generated_code=False, streams=False)
    return str(refusal.value)


@pytest.mark.parametrize("name", ["gsm8k", "wikitext"])
def test_a_model_on_disk_is_only_asked_to_choose(name):
    metric = {"wikitext": "byte_perplexity"}.get(name)
    with pytest.raises(InputError, match=r"more than choose among answers.*\n.*model\.streaming=never"):
        check_tasks([TaskChoice(name, metric=metric)], run_generated_code=False, streams=True)


@pytest.mark.parametrize("name", ["piqa", "mmlu", "lambada_openai"])
def test_a_model_on_disk_may_be_asked_to_choose(name, monkeypatch):
    monkeypatch.setattr("moeprune.evaluation.task_checks.load_harness_task", lambda _task: None)
    check_tasks([TaskChoice(name)], run_generated_code=False, streams=True)


@pytest.fixture
def no_hub(monkeypatch, tmp_path):
    """Nothing was fetched yet, and ``message`` is what the hub says."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)

    def says(message: str) -> None:
        def load_dataset(*_path, **_settings):
            raise DatasetNotFoundError(message)

        monkeypatch.setattr("datasets.load_dataset", load_dataset)

    return says


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_tasks_are_found_by_name(name):
    task = find_task(name)
    assert len(task.leaves) == (57 if name == "mmlu" else 1)
    assert all("dataset_path" in config for config in task.leaves.values())


def test_the_files_of_a_task_are_those_that_lm_eval_itself_reads():
    assert known_tasks()["boolq"].parts[-3:] == ("super_glue", "boolq", "default.yaml")
    assert len(known_tasks()) > 5000


def test_a_group_whose_tasks_lie_in_other_folders_is_found_whole():
    assert sorted(find_task("minerva_math").leaves)[0] == "minerva_math_algebra"


def test_tasks_that_are_written_out_within_a_group_are_left_to_lm_eval():
    assert list(find_task("flan_held_in").leaves) == ["flan_held_in"]


def test_what_a_file_names_but_lm_eval_does_not_read_is_unknown():
    assert "scrolls" in known_tasks()
    assert "Task 'scrolls' does not exist" in refused(TaskChoice("scrolls"))


def test_an_unknown_task_is_told_with_the_nearest_names():
    assert "Did you mean: arc_easy" in refused(TaskChoice("arc_eazy"))
    assert "Did you mean: word_order" in refused(TaskChoice("word_ordr"))


def test_a_tag_is_told_with_its_tasks():
    assert "is no task but a tag of 2 tasks.\nName them: [arc_challenge,arc_easy]" in refused(TaskChoice("ai2_arc"))


def test_a_group_without_a_mean_is_told_with_its_tasks():
    assert "a group of tasks without a mean over them" in refused(TaskChoice("galician_bench"))


def test_a_task_that_needs_another_antlr_is_told_to_have_an_environment_of_its_own():
    told = refused(TaskChoice("minerva_math"))
    assert "cannot be loaded" in told
    assert "an environment of its own: save the model with save_model" in told
    assert "docs/evaluation.md" in told


def test_a_metric_or_number_of_examples_that_a_task_has_not():
    assert "Task 'boolq' has no metric acc_norm.\nPossible: acc,none." in refused(
        TaskChoice("boolq", metric="acc_norm")
    )
    assert "has no metric accuracy.\nPossible: acc_norm,none." in refused(TaskChoice("leaderboard_gpqa"))
    assert "Task 'cloze' has no metric f1.\nPossible: acc,none" in refused(TaskChoice("cloze", metric="f1"))
    wrong_filter = refused(TaskChoice("gsm8k", metric="exact_match,flexible"))
    assert "Possible: exact_match,strict-match, exact_match,flexible-extract." in wrong_filter
    assert 'metric: "exact_match,strict-match"' in wrong_filter
    assert "Task 'gsm8k' has several metrics exact_match" in refused(TaskChoice("gsm8k", metric="exact_match"))
    assert "Possible: exact_match,custom-extract." in refused(TaskChoice("mmlu_pro"))
    assert "defined without examples" in refused(TaskChoice("gpqa_main_zeroshot", fewshot=5))


def test_gated_data_say_how_to_get_them(no_hub):
    no_hub("Dataset 'Idavidrein/gpqa' is a gated dataset on the Hub. You must be authenticated to access it.")
    told = refused(TaskChoice("gpqa_main_zeroshot"))
    assert "Accept its terms at https://huggingface.co/datasets/Idavidrein/gpqa, then log in" in told


def test_data_that_cannot_be_had_say_what_to_do_about_the_connection(no_hub):
    no_hub("Dataset 'baber/piqa' doesn't exist on the Hub or cannot be accessed.")
    told = refused(TaskChoice("piqa"))
    assert "The data of task 'piqa' (baber/piqa) cannot be had" in told
    assert "until=calibration" in told


def test_data_that_were_fetched_before_are_not_asked_for_again(no_hub, tmp_path):
    no_hub("no connection")
    (tmp_path / "baber___piqa").mkdir()
    check_tasks([TaskChoice("piqa")], run_generated_code=False, streams=False)
    with pytest.raises(InputError):
        load_harness_task(find_task("piqa"))


def test_a_choice_is_a_name_or_a_name_with_settings():
    assert task_choices(["piqa", {"name": "gsm8k", "fewshot": 8, "metric": "exact_match,flexible-extract"}]) == (
        TaskChoice("piqa"),
        TaskChoice("gsm8k", 8, "exact_match,flexible-extract"),
    )


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ("piqa", r"no list.\nWrite evaluation\.tasks=\[piqa\]"),
        ([{"fewshot": 5}], "has no name"),
        ([{"name": "piqa", "shots": 5}], r"shots is no setting of a task"),
        ([{"name": "piqa", "fewshot": -1}], "fewshot=-1 is not possible"),
        ([{"name": "piqa", "fewshot": "five"}], "fewshot=five is not possible"),
        (["piqa", {"name": "piqa", "fewshot": 5}], "named twice"),
    ],
)
def test_a_choice_that_says_nothing_sensible_is_an_input_error(tasks, message):
    with pytest.raises(InputError, match=message):
        task_choices(tasks)


def test_a_result_with_several_accuracies_of_the_asked_kind_asks_which():
    metrics = {f"exact_match,{kind}": {"value": 0.5, "stderr": 0.1} for kind in ("strict-match", "flexible-extract")}
    result = {"metrics": metrics, "n": 4, "fewshot": 5}
    assert task_score(TaskChoice("gsm8k"), result)["metric"] == "exact_match,strict-match"
    with pytest.raises(InputError, match="exact_match,flexible-extract"):
        task_score(TaskChoice("gsm8k", metric="exact_match"), result)
    with pytest.raises(InputError, match="has no metric accuracy"):
        task_score(TaskChoice("wikitext"), {"metrics": {"word_perplexity,none": {}}, "n": 4, "fewshot": 0})
