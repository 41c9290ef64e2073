"""Hydra's and OmegaConf's errors about a command, in one message with the nearest valid choices."""

import errno

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from moeprune.app.explain import explained, known_keys
from moeprune.app.main import config_folder
from moeprune.errors import MoepruneError

CONF = config_folder()


def explanation_of(*overrides: str, config_name: str = "config") -> str:
    """What a user is told about overrides that do not compose."""
    with (
        pytest.raises((HydraException, OmegaConfBaseException)) as raised,
        initialize_config_dir(str(CONF), version_base="1.3"),
    ):
        compose(config_name, overrides=list(overrides))
    error = explained(raised.value, CONF, config_name, overrides)
    assert isinstance(error, MoepruneError)
    return str(error)


def test_a_choice_that_does_not_exist_names_the_nearest_and_all():
    possible = "Possible: distill, dora, full, lora, none, router_only."
    assert explanation_of("recovery=nothing") == f"recovery=nothing does not exist.\nDid you mean: none?\n{possible}"
    assert "Did you mean: uniform" in explanation_of("allocator=uniformly")


def test_a_choice_that_is_like_no_other_names_all():
    choices = "gptq2, gptq3, gptq4, hqq2, hqq3, hqq4, int8, nf4, nf4_double, none, rtn2, rtn3, rtn4, rtn8"
    assert explanation_of("quantizer=zzz") == f"quantizer=zzz does not exist.\nPossible: {choices}."


def test_a_path_given_as_the_model_shows_the_command_that_was_meant():
    assert explanation_of("model=/data/my_model") == (
        "model=/data/my_model does not exist.\nUse model=checkpoint model.path=/data/my_model"
    )


def test_an_experiment_of_a_folder_is_named_with_it() -> None:
    assert explanation_of("experiment=paper/main_tabel").startswith(
        "experiment=paper/main_tabel does not exist.\nDid you mean: paper/main_table"
    )


def test_several_values_without_a_sweep_show_the_flag_for_one():
    assert explanation_of("ratio=0.25,0.5").endswith("Add --multirun to run several values.")


def test_an_unknown_group_or_setting_names_the_nearest_of_both():
    assert explanation_of("quantiser=nf4").startswith(
        "quantiser is neither a group nor a setting.\nDid you mean: quantizer"
    )
    assert "Did you mean: cache_dir" in explanation_of("cachedir=/tmp")


def test_an_unknown_setting_of_a_group_names_the_settings_of_its_choices():
    asked, near, possible = explanation_of("allocator.smoothing_round=3").splitlines()
    assert asked == "allocator.smoothing_round is not a setting of any allocator."
    assert near.startswith("Did you mean: allocator.smoothing_rounds")
    assert "allocator.expert_weight" in possible


@pytest.mark.parametrize(
    ("words", "nearest"),
    [
        (["hydra/launcher=slurm", "hydra.launcher.partitin=gpu"], "hydra.launcher.partition"),
        (["hydra/launcher=slurm_cpu", "hydra.launcher.cpu_per_task=2"], "hydra.launcher.cpus_per_task"),
        (["hydra/launcher=local", "hydra.launcher.paralel_jobs=2"], "hydra.launcher.parallel_jobs"),
        (["hydra/sweeper=optuna", "hydra.sweeper.trial=2"], "hydra.sweeper.trials"),
        (["hydra.sweeper.max_batch=2"], "hydra.sweeper.max_batch_size"),
    ],
)
def test_an_unknown_setting_of_a_launcher_or_sweeper_names_those_of_the_chosen_one(words, nearest):
    asked, near, possible = explanation_of(*words).splitlines()
    chosen = words[0] if len(words) > 1 else "hydra/sweeper=basic"
    assert asked == f"{words[-1].split('=')[0]} is not a setting of {chosen}."
    assert near.startswith(f"Did you mean: {nearest}")
    listed = possible.removeprefix("Possible: ").rstrip(".").split(", ")
    assert nearest in listed and all(name.startswith(f"{nearest.rpartition('.')[0]}.") for name in listed)


def test_a_setting_of_another_launcher_names_the_launcher():
    assert explanation_of("hydra.launcher.parallel_jobs=2") == (
        "hydra.launcher.parallel_jobs is not a setting of hydra/launcher=basic.\n"
        "It is one of hydra/launcher=NAME, where NAME is local."
    )


def test_a_further_option_of_sbatch_needs_a_plus():
    asked = "hydra.launcher.additional_parameters.reservation"
    told = explanation_of("hydra/launcher=slurm", f"{asked}=friday")
    assert told == f"{asked} is not there yet.\nAdd it with a + before: +{asked}=VALUE."


def test_an_unknown_setting_of_hydra_names_the_nearest():
    assert "Did you mean: hydra.sweep" in explanation_of("hydra.swep.dir=there")


def test_an_override_that_cannot_be_parsed_shows_how_one_looks():
    assert explanation_of("ratio=[0.5").endswith("Overrides are KEY=VALUE, for example ratio=0.5.")


def test_the_training_command_is_explained_by_its_own_settings():
    assert explanation_of("architecure=tiny_qwen3_moe", config_name="train").startswith(
        "architecure is neither a group nor a setting.\nDid you mean: architecture?"
    )


def test_any_other_error_of_the_config_is_one_line_and_a_way_to_see_more():
    config = OmegaConf.create({"a": "${nothing}"})
    with pytest.raises(OmegaConfBaseException) as raised:
        OmegaConf.to_container(config, resolve=True)
    told = str(explained(raised.value, CONF, "config"))
    assert told.splitlines() == ["Interpolation key 'nothing' not found", "See the composed config with --cfg job."]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES])
def test_a_run_directory_that_cannot_be_written_is_explained(number):
    told = str(explained(OSError(number, "no such luck", "runs/1/metrics.json"), CONF, "config"))
    assert told.startswith("runs/1/metrics.json cannot be written: no such luck.")
    assert "hydra.run.dir=/path and cache_dir=/path" in told


@pytest.mark.parametrize("error", [ValueError("a bug"), FileNotFoundError(errno.ENOENT, "gone"), KeyError("x")])
def test_what_is_not_the_users_mistake_is_not_explained_away(error):
    assert explained(error, CONF, "config") is None


def test_known_keys_are_the_groups_and_the_settings():
    keys = known_keys(CONF, "config")
    assert {"model", "scorer", "experiment", "ratio", "seed", "cache_dir"} <= set(keys)
    assert not {"hydra", "defaults", "_self_"} & set(keys)


def test_a_setting_of_another_choice_names_the_choices_that_have_it_and_what_a_sweep_over_several_needs():
    asked, change = explanation_of("recovery=none", "recovery.training.epochs=1").splitlines()
    assert asked.startswith("recovery.training.epochs is not a setting of the recovery that is chosen")
    assert "recovery.training is there in recovery=distill, dora, full, lora, router_only." in change
    assert change.endswith("write ++recovery.training.epochs=VALUE.")
