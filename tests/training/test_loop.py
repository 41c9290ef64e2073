"""Training: a resumed run equals one that never stopped, the schedule, and what happens when the loss is not finite."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from moeprune.errors import NumericalError
from moeprune.training.data import WindowMixture
from moeprune.training.loop import TrainingSettings, rate_factor, train

SETTINGS = TrainingSettings(
    steps=8,
    batch_size=3,
    sequence_length=9,
    learning_rate=3e-3,
    warmup_steps=2,
    decay_fraction=0.5,
    weight_decay=0.1,
    gradient_clip=1.0,
    balance_weight=0.01,
    seed=0,
    checkpoint_every=4,
    log_every=2,
)


class StoppedError(Exception):
    """Stands for a killed process."""


class WindowsUntil(WindowMixture):
    """Raises in place of the item ``last``."""

    last = None

    def __getitem__(self, item):
        if item == self.last:
            raise StoppedError
        return super().__getitem__(item)


@pytest.fixture
def windows():
    rng = np.random.default_rng(0)
    tokens = {name: rng.integers(1, 257, 400, dtype=np.uint16) for name in ("first", "second")}
    return WindowsUntil(
        tokens,
        {"first": 2.0, "second": 1.0},
        count=SETTINGS.steps * SETTINGS.batch_size,
        sequence_length=SETTINGS.sequence_length,
        begin_token=0,
        seed=1,
    )


@pytest.fixture
def fresh_model(build_model):
    return lambda: build_model("qwen3_renormalised", torch.float32).train()


def curve_of(run_dir):
    lines = [json.loads(line) for line in (run_dir / "loss_curve.jsonl").read_text().splitlines()]
    assert all(line.pop("seconds") > 0 for line in lines)
    return lines


def assert_same_weights(model, expected) -> None:
    for name, tensor in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


@pytest.fixture
def uninterrupted(fresh_model, windows, tmp_path):
    return train(fresh_model(), windows, SETTINGS, tmp_path / "whole"), curve_of(tmp_path / "whole")


@pytest.mark.parametrize("killed_at_step", [4, 5, 6, 7])
def test_a_resumed_run_equals_one_that_never_stopped(uninterrupted, fresh_model, windows, tmp_path, killed_at_step):
    """Killed while it read the batch of a step after the checkpoint at step 4."""
    model, curve = uninterrupted
    windows.last = killed_at_step * SETTINGS.batch_size
    with pytest.raises(StoppedError):
        train(fresh_model(), windows, SETTINGS, tmp_path / "resumed")
    windows.last = None
    resumed = train(fresh_model(), windows, SETTINGS, tmp_path / "resumed")
    assert_same_weights(resumed, model)
    assert curve_of(tmp_path / "resumed") == curve
    assert [line["step"] for line in curve] == [2, 4, 6, 8]


def test_the_curve_is_the_same_where_a_checkpoint_falls_between_two_of_its_points(fresh_model, windows, tmp_path):
    settings = dataclasses.replace(SETTINGS, checkpoint_every=3)
    model = train(fresh_model(), windows, settings, tmp_path / "whole")
    windows.last = 5 * settings.batch_size
    with pytest.raises(StoppedError):
        train(fresh_model(), windows, settings, tmp_path / "resumed")
    windows.last = None
    assert_same_weights(train(fresh_model(), windows, settings, tmp_path / "resumed"), model)
    assert curve_of(tmp_path / "resumed") == curve_of(tmp_path / "whole")


def test_a_run_killed_before_its_first_checkpoint_starts_again(uninterrupted, fresh_model, windows, tmp_path):
    model, curve = uninterrupted
    windows.last = 3 * SETTINGS.batch_size
    with pytest.raises(StoppedError):
        train(fresh_model(), windows, SETTINGS, tmp_path / "resumed")
    windows.last = None
    assert_same_weights(train(fresh_model(), windows, SETTINGS, tmp_path / "resumed"), model)
    assert curve_of(tmp_path / "resumed") == curve


def test_a_finished_run_is_not_trained_further(uninterrupted, fresh_model, windows, tmp_path):
    model, curve = uninterrupted
    assert_same_weights(train(fresh_model(), windows, SETTINGS, tmp_path / "whole"), model)
    assert curve_of(tmp_path / "whole") == curve


def test_training_lowers_the_loss(fresh_model, tmp_path):
    """On one window again and again."""
    window = np.arange(1, 9, dtype=np.uint16)
    windows = WindowMixture({"one": window}, {"one": 1.0}, count=24, sequence_length=9, begin_token=0, seed=0)
    train(fresh_model(), windows, SETTINGS, tmp_path)
    first, *_, last = curve_of(tmp_path)
    assert last["loss"] < first["loss"] - 0.1


def test_the_curve_is_the_mean_loss_of_the_untrained_model_when_the_rate_is_zero(fresh_model, windows, tmp_path):
    settings = dataclasses.replace(SETTINGS, learning_rate=0.0)
    model = train(fresh_model(), windows, settings, tmp_path)
    assert_same_weights(model, fresh_model())
    batches = torch.stack([windows[item]["input_ids"] for item in range(24)]).split(3)
    with torch.no_grad():
        losses = [float(model(input_ids=batch, labels=batch).loss) for batch in batches]
    expected = [(one + other) / 2 for one, other in zip(losses[::2], losses[1::2], strict=True)]
    assert [line["loss"] for line in curve_of(tmp_path)] == pytest.approx(expected, rel=1e-5)


def test_a_loss_that_is_not_a_number_is_a_numerical_error_and_the_last_checkpoint_stays(
    uninterrupted, fresh_model, windows, tmp_path
):
    model = fresh_model()
    calls = []

    def spoil(_module, _inputs, output):
        calls.append(1)
        if len(calls) == 7:
            output.loss = output.loss * float("nan")

    hook = model.register_forward_hook(spoil)
    with pytest.raises(NumericalError, match="The loss is nan at step 6; lower the learning rate"):
        train(model, windows, SETTINGS, tmp_path / "resumed")
    hook.remove()
    (last,) = (tmp_path / "resumed" / "checkpoints").iterdir()
    assert last.name == "step_00000004.safetensors"
    assert all(torch.isfinite(tensor).all() for tensor in load_file(last).values())
    assert_same_weights(train(fresh_model(), windows, SETTINGS, tmp_path / "resumed"), uninterrupted[0])


@pytest.mark.parametrize(
    ("step", "expected"),
    [(0, 0.1), (4, 0.5), (9, 1.0), (10, 1.0), (80, 1.0), (81, 0.95), (90, 0.5), (99, 0.05), (100, 0.0), (120, 0.0)],
)
def test_the_rate_warms_up_stays_and_decays_to_zero(step, expected):
    settings = dataclasses.replace(SETTINGS, steps=100, warmup_steps=10, decay_fraction=0.2)
    assert rate_factor(step, settings) == pytest.approx(expected)


def test_the_rate_without_warm_up_or_decay_is_constant():
    settings = dataclasses.replace(SETTINGS, steps=10, warmup_steps=0, decay_fraction=0.0)
    assert [rate_factor(step, settings) for step in range(10)] == [1.0] * 10


def test_the_rate_never_leaves_zero_to_one_where_warm_up_and_decay_overlap():
    settings = dataclasses.replace(SETTINGS, steps=10, warmup_steps=10, decay_fraction=1.0)
    factors = [rate_factor(step, settings) for step in range(11)]
    assert factors == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0])
