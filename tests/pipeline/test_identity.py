"""Cache keys: the same for the same content, another for anything that changes a result."""

import importlib
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path

import pytest

from moeprune.allocation.budget import Budget
from moeprune.allocation.coverage import CoverageAllocator
from moeprune.calibration.sample import Calibration
from moeprune.calibration.text import EmbeddedText
from moeprune.errors import InputError
from moeprune.pipeline.identity import describe, stage_key
from moeprune.scoring.attribution import AttributionScorer

BUDGET = Budget(ratio=0.25, layers=2, experts=8, width=32, top_k=2, alignment=4, minimum_width=8)
CALIBRATION = Calibration(EmbeddedText(["prose"], "training"), windows=4, sequence_length=8, batch_size=2, seed=0)
CHANGES = [
    (AttributionScorer(), {"alpha": 0.8, "usage": True}),
    (
        CoverageAllocator(),
        {
            "between_layers": "uniform",
            "smoothing": "log",
            "smoothing_rounds": 3,
            "expert_weight": "usage",
            "reallocation": "most_score",
        },
    ),
    (
        BUDGET,
        {"ratio": 0.5, "layers": 3, "experts": 9, "width": 64, "top_k": 3, "alignment": 2, "minimum_width": 16},
    ),
    (
        CALIBRATION,
        {
            "source": EmbeddedText(["code"], "training"),
            "windows": 5,
            "sequence_length": 9,
            "batch_size": 3,
            "seed": 1,
        },
    ),
]

PLUG_IN = """
from dataclasses import dataclass

@dataclass(frozen=True)
class Mine:
    strength: float = 1.0

class Sealed:
    def __init__(self):
        self.strength = 1.0
"""


def key(settings: object) -> str:
    return stage_key("scores", 1, settings, ["a", "b"])


@pytest.fixture
def plug_in(tmp_path, monkeypatch):
    """A module outside the package, and its file."""
    file = tmp_path / "plug_in_of_a_user.py"
    file.write_text(PLUG_IN)
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module(file.stem), file
    del sys.modules[file.stem]


@pytest.mark.parametrize(("settings", "changes"), CHANGES, ids=[type(settings).__name__ for settings, _ in CHANGES])
def test_the_key_is_the_same_for_equal_settings_and_another_for_every_changed_field(settings, changes):
    assert key(replace(settings)) == key(settings)
    assert set(changes) == {field.name for field in fields(settings)}
    changed = [key(replace(settings, **{name: value})) for name, value in changes.items()]
    assert len({key(settings), *changed}) == 1 + len(changes)


def test_stage_version_and_inputs_change_the_key():
    keys = {
        stage_key("scores", 1, None, ["a", "b"]),
        stage_key("plan", 1, None, ["a", "b"]),
        stage_key("scores", 2, None, ["a", "b"]),
        stage_key("scores", 1, None, ["b", "a"]),
        stage_key("scores", 1, None, ["a"]),
        stage_key("scores", 1, 0, ["a", "b"]),
    }
    assert len(keys) == 6


def test_the_key_is_32_hexadecimal_digits_and_the_same_in_every_process():
    assert key({"alpha": 0.9}) == "fa21bc68378070ed4eb9c9ad087660ba"


def test_the_order_of_a_mapping_and_the_kind_of_a_sequence_do_not_matter():
    assert key({"a": 1, "b": (1, 2)}) == key({"b": [1, 2], "a": 1})
    assert key([1, 2]) != key([2, 1])


def test_two_classes_with_the_same_fields_have_different_keys():
    @dataclass(frozen=True)
    class Other:
        alpha: float = 0.9

    assert key(Other()) != key(AttributionScorer())


def test_plain_values_describe_themselves():
    values = {"none": None, "yes": True, "count": 3, "share": 0.5, "name": "x", "path": Path("/a/b"), "list": (1, 2)}
    assert describe(values) == {**values, "path": "/a/b", "list": [1, 2]}


def test_an_identity_method_speaks_for_its_object():
    assert describe(EmbeddedText(["prose"], "training")) == {
        "type": "EmbeddedText",
        "embedded": ["prose"],
        "part": "training",
    }


def test_editing_the_source_of_an_outside_plug_in_changes_the_key(plug_in):
    module, file = plug_in
    before = key(module.Mine())
    assert key(module.Mine()) == before
    file.write_text(PLUG_IN + "\n# one thought later\n")
    assert key(importlib.reload(module).Mine()) != before


def test_a_plug_in_of_the_package_counts_by_its_settings_alone():
    assert "source" not in describe(AttributionScorer())


def test_an_object_whose_settings_cannot_be_seen_is_refused(plug_in):
    module, _ = plug_in
    with pytest.raises(InputError, match=r"(?s)plug_in_of_a_user\.Sealed.*frozen dataclass, or give it an identity"):
        describe(module.Sealed())
    for value in (lambda scores: scores, {1, 2}, object()):
        with pytest.raises(InputError, match="cannot be part of a cache key: its settings are not visible"):
            describe({"scorer": value})


def test_a_plug_in_without_source_is_refused():
    namespace = {"__name__": "no_such_file"}
    exec("from dataclasses import dataclass\n@dataclass(frozen=True)\nclass Typed:\n    strength: int = 1", namespace)
    with pytest.raises(
        InputError, match=r"(?s)no_such_file\.Typed .*its source is not to be found.*Define the plug-in in a file"
    ):
        describe(namespace["Typed"]())
