"""The loss curve of a recovery, read and drawn."""

import json

import numpy as np
import pytest

from moeprune.errors import InputError
from moeprune.report.figures.loss_curve import load_loss_curve, loss_curve_figure, write_loss_curve_plot


@pytest.fixture
def path(tmp_path, made_up_loss_curve):
    file = tmp_path / "loss_curve.jsonl"
    file.write_text("".join(f"{json.dumps(point)}\n" for point in made_up_loss_curve))
    return file


def test_it_is_read_into_arrays(path):
    curve = load_loss_curve(path)
    assert curve.steps_P.tolist() == list(range(1, 51))
    assert curve.loss_P[0] == 4.0
    assert np.isfinite(curve.validation_P).sum() == 5
    assert list(curve.terms) == ["kl"]
    assert {name: rate_P.max() for name, rate_P in curve.rates.items()} == {"experts": 1e-4, "routers": 1e-6}
    assert curve.tokens == 200_000


def test_losses_and_rates_are_drawn_by_name(path):
    losses, rates = loss_curve_figure(load_loss_curve(path), "Recovery dora").axes
    assert [text.get_text() for text in losses.get_legend().get_texts()] == ["training loss", "kl", "validation loss"]
    assert "200,000 training tokens" in losses.get_xlabel()
    assert [text.get_text() for text in rates.get_legend().get_texts()] == ["experts", "routers"]
    assert rates.get_yscale() == "log"
    low, high = rates.get_ylim()
    assert low < 1e-6 and high > 1e-4  # the zero at the end of a cosine does not stretch the axis
    assert low > 1e-9


def test_a_short_curve_without_validation_is_drawn(path):
    first = json.loads(path.read_text().splitlines()[0])
    path.write_text(json.dumps(first))
    losses, _ = loss_curve_figure(load_loss_curve(path), "Recovery dora").axes
    assert [text.get_text() for text in losses.get_legend().get_texts()] == ["training loss", "kl"]


def test_it_is_written_beside_the_file(path):
    assert [file.name for file in write_loss_curve_plot(path, "Recovery dora")] == ["loss_curve.png", "loss_curve.svg"]
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("text", ["", '{"step": 1}', '{"step": 1, "loss', "[1]"])
def test_a_damaged_file_is_named(path, text):
    path.write_text(text)
    with pytest.raises(InputError, match=r"loss_curve\.jsonl is damaged or lacks an entry"):
        load_loss_curve(path)
