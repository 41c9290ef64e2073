"""Text of hub data sets: every choice reads records of its schema, from one file and laid out as on the hub."""

import json
from dataclasses import replace
from pathlib import Path

import datasets
import pytest
from hub_layouts import LAYOUTS, SENTENCES
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from moeprune.calibration.hub_text import HubText
from moeprune.calibration.records import RecordSource
from moeprune.errors import InputError

CONF = Path(__file__).parents[2] / "conf"


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def calibration(choice, path):
    """What the choice's own conf file makes, with another path."""
    with initialize_config_dir(str(CONF), version_base=None):
        config = compose("config", [f"calibration={choice}", f"calibration.source.records.path={path}"])
    return instantiate(config.calibration, _convert_="all")


def as_one_file(choice, folder):
    file = folder / f"{choice}.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in LAYOUTS[choice].records))
    return file


@pytest.mark.parametrize("choice", LAYOUTS)
def test_a_choice_reads_records_of_its_schema_into_windows(choice, tmp_path, byte_tokenizer):
    made = calibration(choice, as_one_file(choice, tmp_path))
    text = made.source.read()[choice]
    assert all(sentence in text for sentence in SENTENCES)
    assert len(text) < 1.5 * sum(len(str(value)) for record in LAYOUTS[choice].records for value in record.values())
    windows = made.sample(byte_tokenizer)
    assert windows.input_ids_NT.shape[1] == 512
    assert len(windows.input_ids_NT) >= 1


@pytest.mark.parametrize("choice", LAYOUTS)
def test_the_library_reads_the_hubs_layout_to_the_same_text(choice, tmp_path):
    """`load_dataset` itself, with the choice's subset, files and, where it has ``first``, streaming."""
    folder = LAYOUTS[choice].write(tmp_path / "data_set")
    from_folder = calibration(choice, folder).source
    assert from_folder.read() == calibration(choice, as_one_file(choice, tmp_path)).source.read()
    if from_folder.records.first is not None:
        fewer = replace(from_folder, records=replace(from_folder.records, first=2)).read()[choice]
        assert fewer in from_folder.read()[choice] and SENTENCES[1] in fewer and SENTENCES[2] not in fewer


def test_the_large_ones_are_streamed_and_all_are_pinned():
    sources = {choice: calibration(choice, "owner/name").source.records for choice in LAYOUTS}
    streamed = {choice for choice, records in sources.items() if records.first}
    assert streamed == {"c4", "redpajama", "open_code_reasoning"}
    assert all(len(records.revision) == 40 for records in sources.values())


def source_of(tmp_path, records, templates, **settings):
    (tmp_path / "records.json").write_text(json.dumps(records))
    return HubText("mine", RecordSource(str(tmp_path / "records.json")), templates, **settings)


def test_a_record_is_written_by_the_first_template_that_it_fills(tmp_path):
    records = [{"a": "1", "b": "2"}, {"a": "3", "b": " "}, {"a": None, "b": "4"}]
    text = source_of(tmp_path, records, ["{a}+{b}", "{a}"]).read()
    assert text == {"mine": "1+2\n\n3"}


def test_empty_records_stay_where_perplexity_is_customarily_measured_with_them(tmp_path):
    """WikiText's rows joined by empty lines, the empty rows among them, as in GPTQ (2210.17323) and after it."""
    rows = ["", " = Title = \n", "", " Words. \n"]
    text = source_of(tmp_path, [{"text": row} for row in rows], ["{text}"], skip_empty=False).read()
    assert text == {"mine": "\n\n".join(rows)}


def test_a_wrong_field_names_those_that_exist(tmp_path):
    with pytest.raises(InputError, match=r"(?s)no field txt.*Did you mean: text.*Possible: text, url"):
        source_of(tmp_path, [{"text": "a", "url": "b"}], ["{txt}"]).read()


def test_fields_that_hold_no_text_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"The field text of a record is a list, not text"):
        source_of(tmp_path, [{"text": ["a"]}], ["{text}"]).read()


def test_records_without_any_text_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"(?s)none of the 2 records of .*records\.json has text.*Possible: text"):
        source_of(tmp_path, [{"text": ""}, {"text": None}], ["{text}"]).read()


@pytest.mark.parametrize(
    ("templates", "reason"),
    [("{text}", "is no list"), ([], "is no list"), (["text"], "has no field"), (["{"], "single")],
)
def test_templates_that_cannot_work_are_refused(templates, reason):
    with pytest.raises(InputError, match=f"(?i){reason}"):
        HubText("mine", RecordSource("owner/name"), templates)


def test_too_little_text_for_one_window_says_so(tmp_path, byte_tokenizer):
    (tmp_path / "few.jsonl").write_text('{"text": "short"}\n')
    with pytest.raises(InputError, match="The text 'c4' does not fill one window of 511 tokens"):
        calibration("c4", tmp_path / "few.jsonl").sample(byte_tokenizer)


def test_identity_says_what_was_read_and_how():
    source = HubText("mine", RecordSource("owner/name", revision="abc", first=5), ["{text}"])
    assert source.identity() == {
        "name": "mine",
        "records": {
            "path": "owner/name", "split": "train", "subset": None, "files": None, "revision": "abc", "first": 5,
        },
        "templates": ["{text}"],
        "skip_empty": True,
    }  # fmt: skip
