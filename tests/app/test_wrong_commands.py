"""Wrong commands end with one message that says what to change, a code that is not 0, and no traceback."""

import json
import re
import shutil
import subprocess
import sys

import pytest

# What is wrong -> the words of the command, and what the message must say. None of these need torch.
REFUSED_BY_CONFIG = {
    "unknown choice": (["scorer=atribution"], r"scorer=atribution does not exist\.\nDid you mean: attribution"),
    "unknown group": (["scorers=attribution"], r"scorers is neither a group nor a setting\.\nDid you mean: scorer"),
    "unknown setting": (["ration=0.5"], r"ration is neither a group nor a setting\.\nDid you mean: ratio"),
    "unknown setting, added": (["+ration=0.5"], r"ration is not a setting\.\nPossible: ratio"),
    "unknown model setting": (
        ["model.alignement=8"],
        r"model\.alignement is not .* model\.\nDid you mean: model\.alig",
    ),
    "unknown model setting, added": (["+model.alignement=8"], r"model\.alignement is not a setting\."),
    "unknown plug-in setting": (["scorer.alhpa=0.5"], r"scorer\.alhpa is not .* scorer\.\nDid you mean: scorer\.alpha"),
    "no value": (["ratio"], r"Error parsing override 'ratio'\nOverrides are KEY=VALUE"),
    "ratio above one": (["ratio=1.2"], r"ratio=1\.2 is not possible.*\nUse a number from 0 up to"),
    "ratio one": (["ratio=1"], r"ratio=1\.0 is not possible"),
    "negative ratio": (["ratio=-0.1"], r"ratio=-0\.1 is not possible"),
    "ratio in words": (["ratio=half"], r"ratio: Value 'half' of type 'str' could not be converted to Float"),
    "seed in words": (["seed=one"], r"seed: Value 'one' of type 'str' could not be converted to Integer"),
    "too few experts": (
        ["model.minimum_width=96", "ratio=0.9"],
        r"4 layers x top-4 experts x minimum width 96 need 1536\.\nUse a ratio of at most 0\.75",
    ),
    "alignment": (["model.alignment=7"], r"alignment=7 does not fit .* width 96.*\nPossible: 1, 2, 3, 4, 6, 8, 12"),
    "minimum width": (["model.minimum_width=20"], r"minimum_width=20 does not fit.*\nSet model\.minimum_width"),
    "dtype": (["model.dtype=float33"], r"model\.dtype=float33 is not possible\.\nDid you mean: float32"),
    "missing folder": (
        ["model=checkpoint", "model.path=/no/such/folder"],
        r"Model path '/no/such/folder' is not a folder\.\nGive model\.path the folder of a checkpoint",
    ),
    "unknown embedded model": (
        ["model.path=embedded:tiny_qwen"],
        r"Embedded model 'tiny_qwen' does not exist\.\nDid you mean: tiny_qwen3_moe",
    ),
    "no path": (["model=checkpoint"], r"A value is missing: model\.path\.\nGive it on the command line"),
    "no text": (
        ["calibration=text_file"],
        r"A value is missing: calibration\.source\.files\.text\.\nGive it .* calibration\.source\.files\.text=VALUE",
    ),
    "target below what stays": (
        ["target_bytes=600"],
        r"A target of 600 bytes cannot be met.*\nUse a target of at least \d+ bytes",
    ),
    "two targets": (["target_bytes=6000000", "target_active_parameters=1400000"], r"were both given\.\nGive one of"),
    "target in words": (["target_bytes=6MB"], r"target_bytes: Value '6MB' .* could not be converted to Integer"),
    "target of experts": (
        ["target_active_parameters=1400000", "method=frequency"],
        r"cannot be met by removing or merging whole experts.*\n?.*\nUse a channel allocator",
    ),
    "target, nothing removed": (
        ["target_bytes=6000000", "method=wanda_unstructured"],
        r"allocator=keep_all removes nothing\.\nGive a ratio",
    ),
    "target with biases": (["target_bytes=6000000", "surgery=bias"], r"does not count the biases.*\nGive a ratio"),
    "merging without distances": (["allocator=merge_linkage"], r"AttributionScorer gives none\.\nUse scorer=hc_smoe"),
    "refitting what is merged": (["method=m_smoe", "surgery=refit"], r"merging removes none\.\nUse surgery=none"),
    "yes or no in words": (["scorer.usage=no"], r"scorer\.usage=no is no bool\.\nUse true or false"),
    "scorer setting in words": (["scorer.alpha=half"], r"scorer\.alpha=half is no float\."),
    "alpha of one": (["scorer.alpha=1"], r"alpha=1 is not possible\.\nUse a number above 0 and below 1"),
    "part of a window": (["calibration.windows=10.5"], r"calibration\.windows=10\.5 is no int\."),
    "removed group": (["~scorer"], r"A value is missing: scorer\."),
    "no conf folder": (["--config-dir", "/no/such/folder"], r"'/no/such/folder' not found"),
}

# What a wrong command imports is what its user waits for: each kind of check, in one process of their own.
LIGHT = ("unknown choice", "unknown setting", "unknown setting, added", "too few experts", "missing folder", "no path")
LIGHT_COMMANDS = """
import json, os, sys
from moeprune.app.main import main
for words in json.loads(sys.argv[1]):
    sys.argv = ["moeprune", *words]
    try:
        main()
    except SystemExit as stop:
        code = stop.code or 0
    else:
        code = 0
    loaded = [name for name in ("torch", "transformers", "wandb", "lm_eval", "matplotlib") if name in sys.modules]
    print("outcome", json.dumps([code, loaded]))
"""


def assert_explained(outcome, message: str) -> None:
    assert outcome.code == 2
    assert re.search(f"moeprune: .*{message}", outcome.err), outcome.err
    assert "Traceback" not in outcome.err + outcome.out


def assert_manifest_says_failed(outcome, kind: str) -> None:
    (manifest,) = outcome.manifests
    content = json.loads(manifest.read_text())
    assert content["status"] == "failed"
    assert content["error"]["type"] == kind
    assert "traceback" not in content["error"]
    assert content["error"]["message"] in outcome.err


@pytest.mark.parametrize(("words", "message"), REFUSED_BY_CONFIG.values(), ids=REFUSED_BY_CONFIG)
def test_a_config_that_cannot_work_is_refused(here, words, message):
    outcome = here("tracking=none", *words)
    assert_explained(outcome, message)
    for manifest in outcome.manifests:
        assert json.loads(manifest.read_text())["status"] == "failed"


def test_a_refused_budget_is_in_the_manifest(here):
    assert_manifest_says_failed(here("model.minimum_width=96", "ratio=0.9"), "BudgetError")
    assert here("ratio=1.2").manifests != []


def test_commands_that_need_no_computing_load_nothing_heavy(tmp_path):
    commands = [REFUSED_BY_CONFIG[what][0] for what in LIGHT] + [["--help"], ["--cfg", "job"]]
    done = subprocess.run(
        [sys.executable, "-c", LIGHT_COMMANDS, json.dumps(commands)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    lines = [line.removeprefix("outcome ") for line in done.stdout.splitlines() if line.startswith("outcome ")]
    outcomes = [json.loads(line) for line in lines]
    assert outcomes == [[2, []]] * len(LIGHT) + [[0, []]] * 2, done.stderr
    assert "One run:  moeprune model=tiny_qwen3_moe" in done.stdout


def test_a_damaged_checkpoint_is_refused_before_it_is_loaded(here, tiny, checkpoint, tmp_path):
    damaged = tmp_path / "damaged"
    shutil.copytree(checkpoint, damaged)
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    outcome = here(*tiny, f"model.path={damaged}")
    assert_explained(outcome, r"model\.safetensors is damaged: \d+ bytes were expected, \d+ are there\.\nCopy or")
    assert_manifest_says_failed(outcome, "ModelError")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", "{", r"config\.json is damaged"),
        ("config.json", None, r"is no checkpoint: it has no config\.json"),
        ("model.safetensors", None, r"lacks model\.safetensors\.\nOnly safetensors checkpoints are read"),
        ("model.safetensors", "not safetensors at all", r"model\.safetensors is damaged"),
    ],
)
def test_a_checkpoint_that_is_not_whole_is_refused(here, tiny, checkpoint, tmp_path, file, content, message):
    broken = tmp_path / "broken"
    shutil.copytree(checkpoint, broken)
    (broken / file).unlink() if content is None else (broken / file).write_text(content)
    assert_explained(here(*tiny, f"model.path={broken}"), message)


def test_a_checkpoint_without_experts_is_refused(here, tiny, tmp_path):
    from transformers import AutoModelForCausalLM, Qwen3Config

    config = Qwen3Config(
        vocab_size=257, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, head_dim=8
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "dense")
    outcome = here(*tiny, f"model.path={tmp_path / 'dense'}")
    assert_explained(outcome, r"\(qwen3\) is no MoE checkpoint that can be pruned\.")
    assert "Use a checkpoint of a family that docs/model.md lists" in outcome.err
    assert_manifest_says_failed(outcome, "ModelError")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"Text 'text': .*empty\.txt is empty\.\nGive a file with text in it\."),
        ("short", r"The text 'text' does not fill one window of 15 tokens\.\nUse a longer text or a smaller sequence_"),
        (None, r"Text 'text': .*empty\.txt does not exist\.\nGive the path of a text file\."),
        (b"\xff\xfe\xfa", r"Text 'text': .*empty\.txt is not UTF-8 text\.\nConvert it to UTF-8\."),
    ],
    ids=["empty", "too short", "missing", "not UTF-8"],
)
def test_a_calibration_text_that_cannot_be_used_is_refused(here, tiny, tmp_path, content, message):
    file = tmp_path / "empty.txt"
    if content is not None:
        file.write_bytes(content.encode() if isinstance(content, str) else content)
    outcome = here(*tiny, f"calibration.source.files.text={file}")
    assert_explained(outcome, message)
    assert_manifest_says_failed(outcome, "InputError")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["+scorer.alhpa=0.5"],
            r"scorer cannot be built from _target_ moeprune\.scoring\.\S+: .*alhpa.*\nCheck the set",
        ),
        (["scorer._target_=no_such_module.Scorer"], r"scorer cannot be built from _target_ no_such_module\.Scorer"),
        (["evaluation.windows=many"], r"evaluation\.windows=many is no int\.\nGive a value of that type"),
        (["calibration.windows=0"], r"windows=0 is not possible\.\nUse a whole number of at least 1"),
        (["calibration.sequence_length=1"], r"sequence_length=1 leaves nothing to predict\.\nUse"),
        (["evaluation.tasks=cloze"], r"tasks=cloze is no list\.\nWrite evaluation\.tasks=\[cloze\]"),
        (["allocator.smoothing_rounds=-1"], r"smoothing_rounds=-1 is not possible\.\nUse 0 or more"),
        (["quantizer=nf4", "+quantizer.bits=3"], r"quantizer cannot be built from _target_ \S+: .*bits"),
    ],
    ids=[
        "unknown setting",
        "not importable",
        "word for a number",
        "no windows",
        "no room for a token",
        "word for a list",
        "negative rounds",
        "of the quantizer",
    ],
)
def test_a_plug_in_with_wrong_settings_is_refused(here, tiny, words, message):
    outcome = here(*tiny, *words)
    assert_explained(outcome, message)
    assert_manifest_says_failed(outcome, "InputError")


def test_an_allocator_that_cannot_meet_the_ratio_is_refused_before_anything_is_computed(here, tiny):
    outcome = here(*tiny, "scorer=frequency", "allocator=whole_experts", "ratio=0.9")
    assert_explained(outcome, r"ratio=0\.9 removes 7 of 8 experts and leaves 1, but every token is sent to 2\.")
    assert_manifest_says_failed(outcome, "BudgetError")
    assert not (outcome.place / "cache").exists()


def test_a_scorer_without_channels_is_refused_by_an_allocator_that_needs_them(here, tiny):
    outcome = here(*tiny, "scorer=frequency", "allocator=coverage")
    assert_explained(
        outcome, r"CoverageAllocator needs a score for every channel; Frequency.*\nUse allocator=whole_exp"
    )
    assert not (outcome.place / "cache").exists()


def test_a_cache_that_cannot_be_written_is_explained(here, tiny, text_file):
    outcome = here(*tiny, f"cache_dir={text_file}")
    assert_explained(outcome, r"The cache .* cannot be written: .*\nChoose another place with cache_dir=/path")
    assert_manifest_says_failed(outcome, "CacheError")


def test_a_launcher_of_sweeps_is_refused_for_a_single_run(here, tiny):
    outcome = here(*tiny, "hydra/launcher=local")
    assert outcome.code == 2
    assert "hydra/launcher=local starts the jobs of a sweep." in outcome.err and "Add --multirun." in outcome.err
    assert not outcome.manifests


def test_a_search_that_stops_before_its_objective_is_refused_before_a_job_runs(here, tiny):
    outcome = here("--multirun", *tiny, "hydra/sweeper=optuna", "ratio=interval(0.2,0.6)", "until=score")
    assert outcome.code == 2
    assert "until=score leaves a search nothing to compare" in outcome.err
    assert not outcome.manifests


@pytest.mark.parametrize(
    ("experiment", "given"), [("paper/granularity_embedded", ["ratio=0.5"]), ("paper/main_table_embedded", [])]
)
def test_a_sweep_without_multirun_is_refused_with_what_its_jobs_set(here, experiment, given):
    outcome = here(f"experiment={experiment}", *given)
    assert outcome.code == 2 and not outcome.manifests
    assert f"experiment={experiment} is a sweep over method" in outcome.err
    assert "Add --multirun, or for a single run of it also give method" in outcome.err
