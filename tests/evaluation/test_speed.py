"""Throughput: what is measured and said, never how fast."""

import math

import pytest
import torch

from moeprune.errors import InputError
from moeprune.evaluation.speed import Speed, measure

one_model = pytest.mark.parametrize("model_name", ["qwen3_renormalised"])
FAST = Speed(batch_size=2, prompt_tokens=6, new_tokens=3, repeats=2)


@one_model
@pytest.mark.parametrize("together", [True, False])
def test_each_model_has_positive_rates_and_says_what_was_measured_on_what(together, build_model, model_name):
    loaders = {name: lambda: build_model(model_name, torch.float32) for name in ("dense", "pruned")}
    found = measure(FAST, loaders, together)
    assert list(found) == ["dense", "pruned"]
    for told in found.values():
        speed = told["speed"]
        for kind in ("prefill", "decode"):
            assert 0 < speed[f"{kind}_tokens_per_second"] < math.inf
        assert (speed["batch_size"], speed["prompt_tokens"], speed["new_tokens"], speed["repeats"]) == (2, 6, 3, 2)
        assert speed["device"].endswith(", threads: 1")
        assert speed["interleaved"] is together


@pytest.mark.parametrize(("together", "groups"), [(True, [["dense", "pruned"]]), (False, [["dense"], ["pruned"]])])
def test_models_that_do_not_fit_together_are_timed_apart(together, groups):
    timed = []

    def speed(models):
        timed.append(list(models))
        return {name: {} for name in models}

    measure(speed, {"dense": object, "pruned": object}, together)
    assert timed == groups


@one_model
def test_models_take_turns_after_a_warm_up(tiny_model, build_model, model_name):
    order, seen, remembers = [], [], []
    models = {"dense": tiny_model, "pruned": build_model(model_name, torch.float32)}
    for name, model in models.items():

        def note(_module, arguments, settings, name=name):
            order.append(name)
            seen.append(arguments[0].shape[1])
            remembers.append(settings.get("past_key_values") is not None)

        model.register_forward_pre_hook(note, with_kwargs=True)
    FAST(models)
    one_turn = [1 + FAST.new_tokens] * 2 * (FAST.repeats + 1)
    assert len(order) == sum(one_turn)
    assert order[:8] == ["dense"] * 4 + ["pruned"] * 4
    assert seen[:4] == [6, 1, 1, 1]
    assert remembers[:4] == [False, True, True, True]


@one_model
def test_prompts_that_do_not_fit_are_an_input_error(tiny_model, monkeypatch):
    def never_fits(*_inputs, **_settings):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(type(tiny_model), "forward", never_fits)
    with pytest.raises(InputError, match=r"2 prompts of 6 tokens do not fit.*\n.*evaluation\.speed\.batch_size"):
        FAST({"dense": tiny_model})


@pytest.mark.parametrize("name", ["batch_size", "prompt_tokens", "new_tokens", "repeats"])
def test_nothing_can_be_measured_of_nothing(name):
    with pytest.raises(InputError, match=f"{name}=0"):
        Speed(**{name: 0})
