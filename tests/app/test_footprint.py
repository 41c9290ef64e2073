"""The command that predicts sizes: its table, its files, its errors, and the published numbers that it explains."""

import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from moeprune.app.main import config_folder, footprint
from moeprune.errors import ModelError
from moeprune.models.expected import config_of, require_expected
from moeprune.models.footprint.measured import count_parameters
from moeprune.models.footprint.prediction import empty_model, even_widths, predict, shape_of
from moeprune.quantization.int8 import Int8Quantizer
from moeprune.quantization.nf4 import NF4Quantizer
from moeprune.report.published.storage import published_storage
from moeprune.report.tables.footprint import GPUS, MEBIBYTE

FACTS = {
    file.stem: (file.read_text(), yaml.safe_load(file.read_text())["expected"])
    for file in sorted((config_folder() / "model").glob("*.yaml"))
    if "expected:" in file.read_text()
}
OF_THE_PAPER = ("qwen1_5_moe_a2_7b", "qwen3_30b_a3b", "deepseek_moe_16b", "deepseek_v2_lite")
LAST_DIGIT = {"GB": 10**9, "GiB": 2**30}


@pytest.fixture
def command(tmp_path, monkeypatch, capfd):
    """``command("ratio=0.5")`` gives (exit code, what was printed, the error)."""
    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["moeprune-footprint", *words])
        code = 0
        try:
            footprint()
        except SystemExit as stop:
            code = stop.code
        return code, *capfd.readouterr()

    return run


def empty(name: str):
    return empty_model(config_of(FACTS[name][1]), torch.bfloat16)


def test_the_papers_models_have_facts():
    assert set(OF_THE_PAPER) < set(FACTS)


@pytest.mark.parametrize("name", FACTS)
def test_facts_make_the_number_of_parameters_that_their_file_says(name):
    text = " ".join(line.removeprefix("# ") for line in FACTS[name][0].splitlines() if line.startswith("#"))
    said = int(re.search(r"make ([\d,]+) parameters", text)[1].replace(",", ""))
    model = empty(name)
    shape = shape_of(model)
    whole = [[shape.width] * shape.experts] * shape.layers
    assert predict(model, whole, torch.bfloat16).parameters == count_parameters(model)
    assert count_parameters(model).total == said


@pytest.mark.parametrize("row", published_storage(), ids=lambda row: f"{row.model} {row.ratio} {row.text}")
def test_published_storage_is_reproduced_by_its_way_of_counting(row):
    model = empty(row.model)
    shape = shape_of(model)
    kept = round((1 - row.ratio) * shape.layers * shape.experts * shape.width)
    quantizer = {"nf4_double": NF4Quantizer(double_quantization=True), "int8_attention_16": Int8Quantizer()}.get(
        row.kind
    )
    predicted = predict(model, even_widths(shape, kept, 1, 1), torch.bfloat16, quantizer)
    size = predicted.bytes.with_overhead
    if row.kind == "ideal_4":
        size = predicted.parameters.total / 2
    if row.kind == "int8_attention_16":
        attention = [p for name, p in model.named_parameters() if re.search(r"self_attn\.\w+\.weight$", name)]
        size += sum(p.numel() - 4 * p.shape[0] - 1 for p in attention)
    if row.unit == "x":
        assert 2 * count_parameters(model).total / size == pytest.approx(row.storage, abs=0.03)
    else:
        assert size / LAST_DIGIT[row.unit] == pytest.approx(row.storage, rel=0.0025 if row.kind == "all_16" else 0.01)


def test_the_published_grid_of_12_is_met_to_its_last_digit():
    grid = [row for row in published_storage() if row.kind == "nf4_double"]
    model = empty(grid[0].model)
    shape = shape_of(model)
    for row in grid:
        kept = round((1 - row.ratio) * shape.layers * shape.experts * shape.width)
        size = predict(model, even_widths(shape, kept, 1, 1), torch.bfloat16, NF4Quantizer(double_quantization=True))
        assert abs(size.bytes.with_overhead / 1e9 - row.storage) < 0.006


def test_one_model_is_one_row_with_published_storage_beside_it(command):
    code, out, _ = command(
        "model=qwen1_5_moe_a2_7b", "ratio=0.25", "quantizer=nf4", "quantizer.double_quantization=true"
    )
    assert code == 0
    assert "6.71 (4.27x)" in out and "6.71 GB (d), 5.6 GB (i)" in out
    assert "11.20B" in out and "RTX 4090 (24 GB)" in out


def test_several_values_make_one_table_and_its_file_has_every_number(command, tmp_path):
    words = [
        "model=tiny_qwen3_moe,tiny_deepseek_v2",
        "ratio=0,0.5",
        "quantizer=none,int8,nf4",
        "context=100",
        "batch=3",
    ]
    code, out, _ = command(*words, "file=sizes.csv")
    rows = list(csv.DictReader((tmp_path / "sizes.csv").open()))
    assert (code, len(rows)) == (0, 12)
    assert out.count("tiny_deepseek_v2") == 3 * 6  # three groups of columns
    assert [row["precision"] for row in rows[:3]] == ["bf16", "int8", "nf4"]
    assert rows[0]["total_parameters"] == "4339648"
    assert int(rows[0]["cache_bytes"]) == 300 * int(rows[0]["cache_per_token"])
    assert float(rows[3]["removed_ratio"]) == 0.5
    stored = [int(row["stored_bytes"]) for row in rows[:3]]
    assert stored == sorted(stored, reverse=True)


@pytest.mark.parametrize("ending", [".md", ".json"])
def test_the_table_is_written_as_its_ending_says(command, tmp_path, ending):
    code, _, _ = command("model=tiny_qwen3_moe", f"file=sizes{ending}")
    text = (tmp_path / f"sizes{ending}").read_text()
    assert code == 0
    assert text.startswith("### Predicted footprint") if ending == ".md" else json.loads(text)[0]["bits"] == 16


def test_a_folder_that_holds_only_a_config_is_enough(command, tmp_path, tiny_checkpoint_config):
    limits = ["model.alignment=4", "model.minimum_width=4"]
    code, out, _ = command("model=checkpoint", f"model.path={tiny_checkpoint_config}", *limits)
    assert code == 0 and "1.00x" in out


@pytest.fixture
def tiny_checkpoint_config(tmp_path, build_model) -> Path:
    folder = tmp_path / "only_config"
    build_model("qwen3_renormalised", torch.float32).config.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["model=qwen3_30b"], "Did you mean: qwen3_30b_a3b"),
        (["ratoi=0.5"], "ratoi"),
        (["ratio=1.5"], "ratio=1.5 is not possible"),
        (["ratio=much"], "ratio"),
        (["--multirun", "ratio=0,0.5"], "need no --multirun"),
        (["file=table.docx"], "no known ending"),
        (["context=0"], "context=0 is not possible"),
        (["model=checkpoint", "model.path=nobody/no-such-model"], "not known before it is downloaded"),
        (["model=gpt_oss_20b", "model.alignment=128"], "blocks must divide the width"),
        (["model.dtype=int3"], "model.dtype=int3 is not possible"),
        (["model.compute_dtype=bf16"], "Did you mean: bfloat16"),
        (["margin_gib=-1"], "margin_gib=-1.0 is not possible"),
        (["margin_gib=nan"], "margin_gib=nan is not possible"),
        (["context=4096,8192"], "One table has one context"),
        (["file=no_such_folder/table.md"], "no_such_folder is no folder of yours"),
        (["quantizer=nf4", "quantizer.block_size=100"], "block_size=100 is not possible"),
        (["file=a.md,b.md"], "One table has one file"),
        (["model=glob(*)"], "model=glob(*) does not name its values"),
        (["ratio=interval(0,1)"], "ratio=interval(0,1) does not name its values"),
    ],
)
def test_a_wrong_command_is_one_message(command, words, said):
    code, _, error = command(*words)
    assert code == 2
    assert said in error and "Traceback" not in error


def test_help_says_how(command):
    code, out, _ = command("--help")
    assert code == 0 and "moeprune-footprint model=qwen3_30b_a3b" in out


def test_a_checkpoint_that_is_not_the_expected_one_is_refused(tiny_checkpoint_config):
    require_expected(tiny_checkpoint_config, {"model_type": "qwen3_moe", "num_experts": 8})
    with pytest.raises(ModelError, match="num_experts 8, expected was 128"):
        require_expected(tiny_checkpoint_config, {"hidden_size": 32, "num_experts": 128})


def test_cards_hold_less_than_their_name_says_in_gibibytes():
    for name, mebibytes in GPUS.items():
        sold = int(re.search(r"\((\d+) GB\)", name)[1])
        assert sold * 10**9 < mebibytes * MEBIBYTE <= sold * 2**30


def test_hydra_says_nothing_of_its_own_on_the_way(tmp_path):
    """It warns of launchers and sweepers that bear its own names."""
    program = Path(sys.executable).with_name("moeprune-footprint")
    words = [str(program), "model=tiny_qwen3_moe", "ratio=0.5"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "validated against ConfigStore" not in done.stderr
