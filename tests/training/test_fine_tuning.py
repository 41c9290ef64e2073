"""Fine-tuning: equal to a plain loop over whole batches, whatever the micro-batches; what trains and what does not."""

import dataclasses
import json
import math
import signal

import pytest
import torch
from safetensors.torch import load_file
from small_training import (
    SETTINGS,
    cross_entropy,
    groups_of,
    labelled_windows,
    network,
    trained,
)

from moeprune.errors import InputError, NumericalError
from moeprune.training.data import LabelledWindows
from moeprune.training.fine_tuning import FineTuning, ParameterGroup, fit, rate_factor


def curve_of(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "loss_curve.jsonl").read_text().splitlines()]


def assert_same_weights(model, expected) -> None:
    for name, tensor in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def assert_close_weights(model, expected, **tolerance) -> None:
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor, msg=name, **tolerance)


class Watching:
    """The objective, which also notes the windows of each call."""

    def __init__(self) -> None:
        self.trained, self.validated = [], []

    def __call__(self, model, batch):
        (self.trained if torch.is_grad_enabled() else self.validated).append(batch["index"].tolist())
        return cross_entropy(model, batch)


def plain_loop(steps: list[list[int]], settings: FineTuning):
    """Whole batches, the mean over their labels, clipping by hand, warm-up of one step in 6, then the cosine."""
    model, windows = network(), labelled_windows()
    model.embedding.requires_grad_(False)
    groups = [{"params": list(group.parameters), "lr": 0.0} for group in groups_of(model)]
    optimizer = torch.optim.AdamW(groups, weight_decay=settings.weight_decay, foreach=False)
    losses = []
    for step, items in enumerate(steps):
        factor = 1.0 if step == 0 else (1 + math.cos(math.pi * (step - 1) / (len(steps) - 1))) / 2
        for group, rate in zip(optimizer.param_groups, (1e-2, 3e-3), strict=True):
            group["lr"] = rate * factor
        logits = model(windows.input_ids_NT[items])[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows.labels_NT[items][:, 1:].flatten())
        optimizer.zero_grad(set_to_none=False)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        loss.backward()
        total = math.sqrt(sum(float((parameter.grad**2).sum()) for group in groups for parameter in group["params"]))
        for group in groups:
            for parameter in group["params"]:
                parameter.grad *= min(1.0, settings.gradient_clip / (total + 1e-6))  # as PyTorch does
        optimizer.step()
        losses.append(loss.item())
    return model, losses


@pytest.mark.parametrize("micro_batch_size", [1, 2, 3, 4, 100])
def test_any_micro_batches_give_what_whole_batches_do(tmp_path, micro_batch_size):
    """4 windows a step with 3 to 6 labels each; the last step of an epoch has 3."""
    settings = dataclasses.replace(SETTINGS, micro_batch_size=micro_batch_size, log_every=1, weight_decay=0.1)
    watching = Watching()
    model = trained(settings, tmp_path, objective=watching)
    items = [item for batch in watching.trained for item in batch]
    steps = [items[first : first + size] for first, size in ((0, 4), (4, 4), (8, 3), (11, 4), (15, 4), (19, 3))]
    expected, losses = plain_loop(steps, settings)
    assert_close_weights(model, expected, rtol=1e-8, atol=1e-9)  # 1e-9 of steps of 1e-2: AdamW divides by tiny norms
    assert [line["loss"] for line in curve_of(tmp_path)] == pytest.approx(losses, rel=1e-9)


def test_every_epoch_has_every_window_once_in_another_order(tmp_path):
    watching = Watching()
    trained(SETTINGS, tmp_path, objective=watching)
    items = [item for batch in watching.trained for item in batch]
    assert sorted(items[:11]) == sorted(items[11:]) == list(range(11))
    assert items[:11] != items[11:]
    assert items[:11] != sorted(items[:11])


def test_another_seed_gives_another_order(tmp_path):
    first, second = Watching(), Watching()
    trained(SETTINGS, tmp_path / "first", objective=first)
    trained(dataclasses.replace(SETTINGS, seed=6), tmp_path / "second", objective=second)
    assert first.trained != second.trained


def test_only_the_groups_parameters_change(tmp_path):
    model = trained(SETTINGS, tmp_path)
    before = network().state_dict()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name in before if not name.startswith("embedding") and ".unused." not in name}
    assert not model.embedding.weight.requires_grad
    assert all(p.requires_grad for p in model.head.parameters())


def test_the_curve_has_the_rates_of_both_groups_and_counts_labels(tmp_path):
    settings = dataclasses.replace(SETTINGS, warmup_ratio=0.3)
    trained(settings, tmp_path)
    curve = curve_of(tmp_path)
    assert [line["step"] for line in curve] == [2, 4, 6]
    # Two steps of warm-up, then cosine from 1 at step 2 (from 0) to 0 at step 6.
    factors = [1.0, (1 + math.cos(math.pi / 4)) / 2, (1 + math.cos(3 * math.pi / 4)) / 2]
    for line, factor in zip(curve, factors, strict=True):
        assert line["learning_rate"] == pytest.approx({"layers": 1e-2 * factor, "head": 3e-3 * factor})
    assert curve[-1]["tokens"] == 2 * labelled_windows().target_count
    assert 0 < curve[0]["seconds"] < curve[1]["seconds"] < curve[2]["seconds"]


def test_the_curve_also_has_the_last_step(tmp_path):
    trained(dataclasses.replace(SETTINGS, log_every=4), tmp_path)
    assert [line["step"] for line in curve_of(tmp_path)] == [4, 6]


@pytest.mark.parametrize(
    ("schedule", "expected"), [("constant", [0.25, 0.5, 0.75, 1, 1, 1]), ("cosine", [0.25, 0.5, 0.75, 1, 1, 0.5])]
)
def test_schedules_warm_up_from_above_0(schedule, expected):
    assert [rate_factor(schedule, 6, 4, step) for step in range(6)] == pytest.approx(expected)


def test_dropout_is_on_in_training_and_off_afterwards(tmp_path):
    model = network(dropout=0.5).eval()
    fit(model, groups_of(model), labelled_windows(), cross_entropy, SETTINGS, tmp_path)
    assert not model.training
    plain = trained(SETTINGS, tmp_path / "plain")
    assert not torch.equal(model.head.weight, plain.head.weight)


def test_terms_of_the_objective_are_in_the_curve_per_label(tmp_path):
    def with_entropy(model, batch):
        terms = cross_entropy(model, batch)
        return {**terms, "halved": terms["loss"].detach() / 2}

    trained(SETTINGS, tmp_path, objective=with_entropy)
    for line in curve_of(tmp_path):
        assert line["halved"] == pytest.approx(line["loss"] / 2)


VALIDATED = dataclasses.replace(SETTINGS, validation_windows=3, validate_every_steps=1)


def held_out_loss(model, items) -> float:
    windows = labelled_windows()
    with torch.no_grad():
        logits = model(windows.input_ids_NT[items])[:, :-1]
    labels = windows.labels_NT[items][:, 1:]
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()))


def test_held_out_windows_are_measured_without_dropout_and_never_trained_on(tmp_path):
    watching = Watching()
    model = trained(VALIDATED, tmp_path, objective=watching, dropout=0.5)
    used = {item for batch in watching.trained for item in batch}
    held_out = {item for batch in watching.validated for item in batch}
    assert held_out == {0, 3, 7}
    assert used == set(range(11)) - held_out
    last = curve_of(tmp_path)[-1]
    assert last["validation_loss"] == pytest.approx(held_out_loss(model.eval(), [0, 3, 7]))


class Measured:
    """The objective; validations give these losses in turn, and the head's bias at the time is kept."""

    def __init__(self, losses) -> None:
        self.losses, self.biases = list(losses), []

    def __call__(self, model, batch):
        terms = cross_entropy(model, batch)
        if torch.is_grad_enabled():
            return terms
        self.biases.append(model.head.bias.detach().clone())
        return {**terms, "loss": terms["targets"] * self.losses.pop(0)}


def test_training_stops_when_patience_ends_with_the_best_parameters(tmp_path):
    settings = dataclasses.replace(VALIDATED, epochs=10, micro_batch_size=4, patience=2)
    measured = Measured([5.0, 4.0, 4.5, 4.0])
    model = trained(settings, tmp_path, objective=measured)
    assert [line["validation_loss"] for line in curve_of(tmp_path)] == [5.0, 4.0, 4.5, 4.0]
    assert torch.equal(model.head.bias, measured.biases[1])
    again = trained(settings, tmp_path, objective=Measured([]))
    assert_same_weights(again, model)


def test_the_best_parameters_are_kept_also_where_patience_does_not_end(tmp_path):
    settings = dataclasses.replace(VALIDATED, micro_batch_size=4, validate_every_steps=2, patience=3)
    measured = Measured([3.0, 4.0])
    model = trained(settings, tmp_path, objective=measured)
    assert torch.equal(model.head.bias, measured.biases[0])


def test_without_patience_the_last_parameters_stay(tmp_path):
    settings = dataclasses.replace(VALIDATED, micro_batch_size=4, validate_every_steps=2)
    measured = Measured([3.0, 4.0])
    model = trained(settings, tmp_path, objective=measured)
    assert torch.equal(model.head.bias, measured.biases[-1])


class Spoilt:
    """The objective, which multiplies the loss or gradient of a call by a number."""

    def __init__(self, call, number, *, gradient_only=False) -> None:
        self.left, self.number, self.gradient_only = call, number, gradient_only

    def __call__(self, model, batch):
        terms = dict(cross_entropy(model, batch))
        self.left -= 1
        if self.left == 0:
            if self.gradient_only:
                terms["loss"].register_hook(lambda gradient: gradient * self.number)
            else:
                terms["loss"] = terms["loss"] * self.number
        return terms


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (
            Spoilt(9, math.nan),
            r"at step 4; lower the learning rate \(now: layers 0.*\nThe checkpoint of step 3 stays in .*checkpo",
        ),
        (Spoilt(10, math.inf), "The loss is inf at step 4"),
        (Spoilt(9, math.inf, gradient_only=True), r"The gradients' norm is (inf|nan) at step 4"),
    ],
)
def test_what_is_not_finite_stops_and_the_last_good_checkpoint_stays(tmp_path, objective, message):
    """Two micro-batches a step but for the third: calls 1 to 6 are steps 0 to 2, calls 9 and 10 are step 4."""
    with pytest.raises(NumericalError, match=message):
        trained(SETTINGS, tmp_path / "spoilt", objective=objective)
    (last,) = (tmp_path / "spoilt" / "checkpoints").iterdir()
    assert last.name == "step_00000003.safetensors"
    assert all(torch.isfinite(tensor).all() for tensor in load_file(last).values())
    assert [line["step"] for line in curve_of(tmp_path / "spoilt")] == [2, 4]
    assert_same_weights(trained(SETTINGS, tmp_path / "spoilt"), trained(SETTINGS, tmp_path / "whole"))


@pytest.mark.parametrize("patience", [None, 1])
def test_a_validation_loss_that_is_not_finite_stops_too(tmp_path, patience):
    """Else the first would be the lowest for ever, and its parameters be kept."""

    def spoilt(model, batch):
        terms = dict(cross_entropy(model, batch))
        return terms if model.training else {**terms, "loss": terms["loss"] * math.nan}

    settings = dataclasses.replace(SETTINGS, validation_windows=2, validate_every_steps=4, patience=patience)
    with pytest.raises(NumericalError, match=r"The validation loss is nan at step 3; .*\nThe checkpoint of step 3"):
        trained(settings, tmp_path, objective=spoilt)
    assert [line["step"] for line in curve_of(tmp_path)] == [2]


def test_a_step_that_is_not_finite_changes_no_parameter(tmp_path):
    model = network()
    with pytest.raises(NumericalError, match="There is no checkpoint yet"):
        fit(model, groups_of(model), labelled_windows(), Spoilt(1, math.nan), SETTINGS, tmp_path)
    assert_same_weights(model, network())


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed", "bf16-true", "32-true"])
def test_the_loss_falls_in_every_precision(tmp_path, precision):
    dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32
    settings = dataclasses.replace(SETTINGS, epochs=12, precision=precision, log_every=6)
    model = network(dtype)
    fit(model, groups_of(model), labelled_windows(), cross_entropy, settings, tmp_path)
    first, *_, last = curve_of(tmp_path)
    assert last["loss"] < first["loss"] - 0.1
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}


def test_float16_losses_scaled_too_high_skip_steps_and_the_scale_is_in_the_checkpoint(tmp_path):
    """A gradient of 100 per label is infinite in float16 until the scale has come down."""

    def steep(model, batch):
        terms = cross_entropy(model, batch)
        return {**terms, "loss": 100 * terms["loss"]}

    settings = dataclasses.replace(SETTINGS, epochs=4, precision="16-mixed", log_every=1)
    model = network(torch.float32)
    fit(model, groups_of(model), labelled_windows(), steep, settings, tmp_path / "whole")
    norms = [line["gradient_norm"] for line in curve_of(tmp_path / "whole")]
    assert norms[0] is None
    assert norms[-1] > 0
    resumed = network(torch.float32)
    with pytest.raises(NumericalError):
        fit(resumed, groups_of(resumed), labelled_windows(), StopAfter(steep, 9), settings, tmp_path / "resumed")
    fit(resumed, groups_of(resumed), labelled_windows(), steep, settings, tmp_path / "resumed")
    assert_same_weights(resumed, model)


class StopAfter:
    def __init__(self, objective, calls) -> None:
        self.objective, self.left = objective, calls

    def __call__(self, model, batch):
        self.left -= 1
        if self.left < 0:
            raise NumericalError("stopped")
        return self.objective(model, batch)


def test_parameters_of_16_bits_are_refused_where_their_updates_would_be_lost(tmp_path):
    model = network(torch.bfloat16)
    with pytest.raises(InputError, match="wants float32 for the parameters that train, and some are"):
        fit(model, groups_of(model), labelled_windows(), cross_entropy, SETTINGS, tmp_path)


def test_a_slurm_job_is_one_device_and_keeps_its_signal_handlers(tmp_path, monkeypatch):
    for name, value in {"NTASKS": "4", "JOB_ID": "7", "PROCID": "2", "LOCALID": "2", "NODELIST": "nodes[1-4]"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("SLURM_JOB_NAME", "recovery")
    signals = [signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM]
    before = [signal.getsignal(each) for each in signals]
    during = []

    def watching(model, batch):
        during.append([signal.getsignal(each) for each in signals])
        return cross_entropy(model, batch)

    in_slurm = trained(SETTINGS, tmp_path / "slurm", objective=watching)
    assert all(each == before for each in during)
    monkeypatch.undo()
    assert_same_weights(in_slurm, trained(SETTINGS, tmp_path / "plain"))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"epochs": 0}, "epochs=0 is not possible"),
        ({"patience": 0, "validation_windows": 2}, "patience=0 is not possible"),
        ({"patience": 1}, "patience needs windows"),
        ({"precision": "bf16"}, "Did you mean: bf16-true, bf16-mixed"),
        ({"schedule": "cosin"}, "Did you mean: cosine"),
        ({"strategy": "deepspeed"}, "strategy=deepspeed does not exist"),
        ({"warmup_ratio": 1.5}, "warmup_ratio=1.5"),
        ({"gradient_clip": 0.0}, "gradient_clip=0.0"),
        ({"seed": -1}, "seed=-1 is not possible"),
        ({"validation_windows": -1}, "validation_windows=-1 is not possible"),
        ({"devices": 3, "batch_size": 4, "micro_batch_size": 2}, "leaves some of 3 devices idle"),
    ],
)
def test_settings_that_cannot_work_are_refused(changed, message):
    with pytest.raises(InputError, match=message):
        FineTuning(**changed)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (lambda model: [], "No parameter is to train"),
        (lambda model: [ParameterGroup("none", [], 1.0)], "No parameter is to train"),
        (lambda model: [*groups_of(model), ParameterGroup("again", [model.head.bias], 1.0)], "head.bias is more than"),
        (lambda model: groups_of(network()), "of another model"),
    ],
)
def test_groups_that_cannot_train_are_refused(tmp_path, groups, message):
    model = network()
    with pytest.raises(InputError, match=message):
        fit(model, groups(model), labelled_windows(), cross_entropy, SETTINGS, tmp_path)


def test_results_do_not_depend_on_how_the_work_is_shared_and_saved():
    """So a run that was cut finds its checkpoints again with other such settings, as after running out of memory."""
    free = {
        "micro_batch_size": 3, "gradient_checkpointing": True, "devices": 2, "strategy": "fsdp",
        "checkpoint_every_steps": 1, "checkpoint_every_min": 1.0,
    }  # fmt: skip
    assert dataclasses.replace(SETTINGS, **free).identity() == SETTINGS.identity()
    changed = {"epochs": 3, "log_every": 1, "seed": 1, "precision": "bf16-true", "weight_decay": 0.1, "patience": None}
    changed |= {"batch_size": 5, "gradient_clip": 1.0, "balance_weight": 0.1, "validation_windows": 1}
    base = dataclasses.replace(SETTINGS, patience=1, validation_windows=2)
    assert all(
        dataclasses.replace(base, **{name: value}).identity() != base.identity() for name, value in changed.items()
    )


@pytest.mark.parametrize("rate", [-1e-4, math.nan, math.inf])
def test_a_learning_rate_that_does_not_learn_is_refused(rate):
    with pytest.raises(InputError, match=f"learning rate of layers is {rate}"):
        ParameterGroup("layers", [], rate)


def test_holding_out_all_windows_is_refused(tmp_path):
    settings = dataclasses.replace(SETTINGS, validation_windows=11)
    with pytest.raises(InputError, match="validation_windows=11 of 11 windows leaves none"):
        trained(settings, tmp_path)


def test_a_model_without_gradient_checkpointing_says_so(tmp_path):
    with pytest.raises(InputError, match="Network has no gradient checkpointing"):
        trained(dataclasses.replace(SETTINGS, gradient_checkpointing=True), tmp_path)


def test_labels_that_do_not_fit_or_do_not_count_are_refused():
    ids = torch.ones(2, 4, dtype=torch.int64)
    with pytest.raises(InputError, match="cannot have labels of shape"):
        LabelledWindows(ids, ids[:, 1:])
    labels = torch.full_like(ids, -100)
    labels[:, 0] = 1  # nothing comes before it
    with pytest.raises(InputError, match="gives a loss"):
        LabelledWindows(ids, labels)
