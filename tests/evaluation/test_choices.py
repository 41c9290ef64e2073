"""Every choice of conf/evaluation becomes an evaluation, and says what the paper's settings are."""

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from moeprune.evaluation.evaluate import Evaluation
from moeprune.evaluation.task_choice import TaskChoice

CONF = Path(__file__).parents[2] / "conf"
CHOICES = sorted(file.stem for file in (CONF / "evaluation").glob("*.yaml"))


def chosen(choice: str, *overrides: str) -> Evaluation:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("config", overrides=[f"evaluation={choice}", *overrides])
    return instantiate(config.evaluation, _convert_="all")


@pytest.mark.parametrize("choice", CHOICES)
def test_every_choice_can_be_built(choice):
    files = ["evaluation.source.files.text=held_out.txt"] if choice == "text_file" else []
    evaluation = chosen(choice, *files)
    assert isinstance(evaluation, Evaluation)
    assert not evaluation.run_generated_code
    assert (evaluation.speed is not None) == (choice == "speed")


def test_the_papers_evaluation_is_that_of_the_field():
    evaluation = chosen("paper")
    assert [choice.name for choice in evaluation.task_choices] == [
        "arc_challenge", "arc_easy", "hellaswag", "piqa", "boolq", "winogrande", "mmlu", "gsm8k", "humaneval",
    ]  # fmt: skip
    assert (evaluation.windows, evaluation.sequence_length, evaluation.batch_size) == (None, 2048, "auto")
    source = evaluation.source
    assert (source.records.subset, source.records.split) == ("wikitext-2-raw-v1", "test")
    assert not source.skip_empty


def test_a_task_with_settings_can_be_written_on_the_command_line():
    tasks = 'evaluation.tasks=[piqa,{name:gsm8k,fewshot:8,metric:"exact_match,flexible-extract"}]'
    assert chosen("paper", tasks).task_choices == (
        TaskChoice("piqa"),
        TaskChoice("gsm8k", 8, "exact_match,flexible-extract"),
    )
