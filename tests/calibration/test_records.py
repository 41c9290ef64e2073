"""Records from local files and the hub: read in order, identified by content, refused with a reason."""

import json

import datasets
import pytest

from moeprune.calibration.records import RecordSource
from moeprune.errors import InputError

RECORDS = [{"instruction": "Add 1 and 2.", "output": "3"}, {"instruction": "é\u2028?", "output": "ok"}]


@pytest.fixture
def write(tmp_path):
    """``write(name, text)``: a source of a file with that text."""

    def written(name, text):
        (tmp_path / name).write_text(text, encoding="utf-8")
        return RecordSource(str(tmp_path / name))

    return written


@pytest.mark.parametrize("indent", [None, 2])
def test_a_json_file_is_a_list(write, indent):
    assert write("data.json", json.dumps(RECORDS, indent=indent)).read() == RECORDS


def test_a_jsonl_file_has_a_record_per_line(write):
    lines = [json.dumps(record, ensure_ascii=False) for record in RECORDS]
    assert write("data.jsonl", "\n".join([lines[0], "", lines[1], ""])).read() == RECORDS
    assert write("data.jsonl", "\ufeff" + "\r\n".join(lines)).read() == RECORDS


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("data.json", "[]", "holds no record"),
        ("data.jsonl", "\n\n", "holds no record"),
        ("data.json", '{"a": 1}', "holds a dict"),
        ("data.json", '[{"a": 1},\n {"a" 2}]', "line 2, column 7: Expecting ':' delimiter"),
        ("data.json", '{"a": 1}\n{"a": 2}', "line 2, column 1: Extra data.\nA .json file holds one list"),
        ("data.json", '[{"a": 1}, "b"]', "record 2: b is no object"),
        ("data.jsonl", '{"a": 1}\n\n{"a": }', "line 3, column 7"),
        ("data.jsonl", '{"a": 1}\n[1, 2]', r"line 2: \[1, 2\] is no object"),
    ],
)
def test_what_holds_no_records_is_an_input_error_with_its_place(write, name, text, reason):
    with pytest.raises(InputError, match=reason):
        write(name, text).read()


def test_a_file_that_is_missing_or_unreadable_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match=r"absent\.json does not exist"):
        RecordSource(str(tmp_path / "absent.json")).read()
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(InputError, match=r"folder\.json cannot be read"):
        RecordSource(str(tmp_path / "folder.json")).read()
    (tmp_path / "latin.jsonl").write_bytes('{"a": "é"}'.encode("latin-1"))
    with pytest.raises(InputError, match=r"latin\.jsonl is not UTF-8"):
        RecordSource(str(tmp_path / "latin.jsonl")).read()
    (tmp_path / "table.csv").write_text("a,b")
    with pytest.raises(InputError, match=r"table\.csv is no \.json or \.jsonl file"):
        RecordSource(str(tmp_path / "table.csv")).read()


def test_identity_of_a_file_follows_content_and_not_place(write):
    before = write("one.json", json.dumps(RECORDS)).identity()
    assert write("two.json", json.dumps(RECORDS)).identity() == before
    assert write("one.json", json.dumps(RECORDS[:1])).identity() != before


def test_identity_of_a_hub_data_set_is_what_names_it():
    source = RecordSource("owner/name", revision="abc")
    assert source.identity() == {
        "path": "owner/name", "split": "train", "subset": None, "files": None, "revision": "abc", "first": None,
    }  # fmt: skip


def test_a_data_set_of_the_hub_is_asked_for_as_configured(monkeypatch):
    asked = []

    def load_dataset(*arguments, **keywords):
        asked.append((arguments, keywords))
        return datasets.Dataset.from_list(RECORDS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = RecordSource("owner/name", "test", subset="main", files="part-*", revision="abc")
    records = source.read()
    assert [dict(records[index]) for index in range(len(records))] == RECORDS
    keywords = {"split": "test", "data_files": "part-*", "revision": "abc", "streaming": False}
    assert asked == [(("owner/name", "main"), keywords)]


def test_the_first_records_of_a_data_set_are_streamed_and_no_more_is_read(monkeypatch):
    seen = []

    def generated():
        for number in range(1000):
            seen.append(number)
            yield {"number": number}

    def load_dataset(*arguments, streaming, **keywords):
        assert streaming
        return datasets.IterableDataset.from_generator(generated)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert [record["number"] for record in RecordSource("owner/name", first=3).read()] == [0, 1, 2]
    assert len(seen) < 10


@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
def test_the_first_records_of_a_file(tmp_path, name):
    lines = map(json.dumps, RECORDS)
    text = json.dumps(RECORDS) if name.endswith(".json") else "\n\n".join(lines)
    (tmp_path / name).write_text(text, encoding="utf-8")
    first = RecordSource(str(tmp_path / name), first=1)
    assert first.read() == RECORDS[:1]
    assert first.identity() != RecordSource(str(tmp_path / name)).identity()


def test_no_records_at_all_cannot_be_asked_for():
    with pytest.raises(InputError, match="first=0 is not possible"):
        RecordSource("owner/name", first=0)


def test_identity_of_a_folder_follows_content_and_not_place(tmp_path):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "train.jsonl").write_text('{"text": "a"}\n')
    one, two = (RecordSource(str(tmp_path / folder)) for folder in ("one", "two"))
    before = one.identity()
    assert two.identity() == before
    (tmp_path / "one" / "train.jsonl").write_text('{"text": "b"}\n')
    assert one.identity() != before


def test_a_data_set_that_cannot_be_reached_says_what_to_do_without_a_connection(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"(?s)owner/name cannot be had.*HF_HOME.*records\.path"):
        RecordSource("owner/name").read()


def test_files_that_are_not_streamed_are_kept_whole_and_are_the_same_records(tmp_path, monkeypatch):
    """Streaming leaves nothing for a machine without a connection."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "part.jsonl").write_text("\n".join(json.dumps({"text": str(n)}) for n in range(9)))
    loaded, load = [], datasets.load_dataset

    def load_dataset(*arguments, **settings):
        loaded.append(settings["streaming"])
        return load(*arguments, **settings, cache_dir=tmp_path / "cache")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    streamed, kept = (RecordSource(str(tmp_path / "data"), first=3, stream=stream) for stream in (True, False))
    assert list(streamed.read()) == list(kept.read()) == [{"text": "0"}, {"text": "1"}, {"text": "2"}]
    assert loaded == [True, False]
    assert streamed.identity() == kept.identity()
