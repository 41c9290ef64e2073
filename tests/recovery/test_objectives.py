"""The objectives against loops over tokens in float64, and their gradients against autograd on all logits."""

import itertools
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import default_collate

from moeprune.errors import InputError, ModelError
from moeprune.recovery.objectives import Distillation, LanguageModelling
from moeprune.recovery.teacher import bucketed
from moeprune.training.data import NO_LABEL, LabelledWindows

VOCAB_SIZE = 257


@pytest.fixture
def windows(random_windows):
    """Five windows of 11 tokens; window i has labels from token 2 i on, and none at its last token but in the first."""
    labels_NT = random_windows.input_ids_NT.clone()
    labels_NT[:, 0] = NO_LABEL
    labels_NT[1:, -1] = NO_LABEL
    for row, labels_T in enumerate(labels_NT):
        labels_T[: 2 * row] = NO_LABEL
    return LabelledWindows(random_windows.input_ids_NT, labels_NT)


@pytest.fixture
def batch(windows):
    """Windows 3, 0 and 4, in this order."""
    return default_collate([windows[index] for index in (3, 0, 4)])


@pytest.fixture
def teacher(build_model, model_name):
    """Another model of the same shape as ``tiny_model_64``."""
    model = build_model(model_name, torch.float64)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


def predicting_logits(model, batch):
    """The logits that predict each label that counts, [M, V], and the labels, by a loop over windows and tokens."""
    logits_BTV = model(input_ids=batch["input_ids"]).logits
    places = [
        (row, place)
        for row, labels_T in enumerate(batch["labels"].tolist())
        for place, label in enumerate(labels_T)
        if place > 0 and label != NO_LABEL
    ]
    logits_MV = torch.stack([logits_BTV[row, place - 1] for row, place in places])
    return logits_MV, [int(batch["labels"][row, place]) for row, place in places]


def cross_entropy(logits_MV, labels):
    return sum(-logits_V.log_softmax(dim=0)[label] for logits_V, label in zip(logits_MV, labels, strict=True))


def gradients(model, loss):
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.autograd.grad(loss, parameters, allow_unused=True)


def assert_same_gradients(model, loss, expected, atol=1e-9):
    for actual, wanted in zip(gradients(model, loss), gradients(model, expected), strict=True):
        assert (actual is None) == (wanted is None)
        if wanted is not None:
            torch.testing.assert_close(actual, wanted, rtol=1e-6, atol=atol)


def test_language_modelling_is_the_sum_over_the_labels_that_count(tiny_model_64, batch):
    terms = LanguageModelling()(tiny_model_64, batch)
    logits_MV, labels = predicting_logits(tiny_model_64, batch)
    assert int(terms["targets"]) == len(labels) == 4 + 10 + 2
    expected = cross_entropy(logits_MV, labels)
    torch.testing.assert_close(terms["loss"], expected)
    assert_same_gradients(tiny_model_64, terms["loss"], expected)


def test_a_batch_without_labels_has_no_loss_and_gradients_of_zero(tiny_model, batch):
    terms = LanguageModelling()(tiny_model, {**batch, "labels": torch.full_like(batch["labels"], NO_LABEL)})
    assert (float(terms["loss"].detach()), int(terms["targets"])) == (0, 0)
    assert all(gradient is None or (gradient == 0).all() for gradient in gradients(tiny_model, terms["loss"]))


def test_half_precision_is_summed_in_float32(tiny_model, batch):
    terms = LanguageModelling()(tiny_model.to(torch.bfloat16), batch)
    assert terms["loss"].dtype == torch.float32


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_distillation_with_all_logits_is_the_whole_kl(
    tiny_model_64, teacher, windows, batch, model_name, temperature, tmp_path
):
    settings = Distillation(0.3, 0.7, temperature, top_k=VOCAB_SIZE)
    terms = settings.prepare(windows, lambda: teacher, tmp_path)(tiny_model_64, batch)
    student_MV, labels = predicting_logits(tiny_model_64, batch)
    with torch.no_grad():
        teacher_MV, _ = predicting_logits(teacher, batch)
    kl = torch.zeros((), dtype=torch.float64)
    for student_V, teacher_V in zip(student_MV, teacher_MV, strict=True):
        log_q_V, log_p_V = (student_V / temperature).log_softmax(0), (teacher_V / temperature).log_softmax(0)
        kl = kl + (log_p_V.exp() * (log_p_V - log_q_V)).sum()
    expected = 0.3 * cross_entropy(student_MV, labels) + 0.7 * temperature**2 * kl
    # The teacher's logits are kept in float32.
    torch.testing.assert_close(terms["loss"], expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(terms["kl"], kl.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(terms["cross_entropy"], cross_entropy(student_MV, labels).detach())
    assert int(terms["targets"]) == len(labels)
    assert_same_gradients(tiny_model_64, terms["loss"], expected, atol=1e-5)


def test_distillation_with_some_logits_treats_all_others_as_one(tiny_model_64, teacher, windows, batch, tmp_path):
    temperature, top_k = 1.7, 5
    terms = Distillation(0.0, 1.0, temperature, top_k).prepare(windows, lambda: teacher, tmp_path)(tiny_model_64, batch)
    student_MV, _ = predicting_logits(tiny_model_64, batch)
    with torch.no_grad():
        teacher_MV, _ = predicting_logits(teacher, batch)
    kl = torch.zeros((), dtype=torch.float64)
    for student_V, teacher_V in zip(student_MV, teacher_MV, strict=True):
        q_V, p_V = (student_V / temperature).softmax(0), (teacher_V / temperature).softmax(0)
        kept = sorted(range(VOCAB_SIZE), key=lambda token: -float(p_V[token]))[:top_k]
        rest_q, rest_p = 1 - q_V[kept].sum(), 1 - p_V[kept].sum()
        kl = kl + (p_V[kept] * (p_V[kept] / q_V[kept]).log()).sum() + rest_p * (rest_p / rest_q).log()
    torch.testing.assert_close(terms["loss"], temperature**2 * kl, rtol=1e-6, atol=1e-6)
    assert_same_gradients(tiny_model_64, terms["loss"], temperature**2 * kl, atol=1e-5)


def kl(teacher_MB, student_MB):
    log_p, log_q = teacher_MB.log_softmax(dim=1), student_MB.log_softmax(dim=1)
    return float((log_p.exp() * (log_p - log_q)).sum())


@given(st.integers(0, 10_000), st.integers(2, 40), st.floats(0.1, 20), st.floats(0.3, 5))
def test_a_few_logits_give_a_lower_bound_that_grows_to_the_whole_kl(seed, vocabulary, spread, temperature):
    generator = torch.Generator().manual_seed(seed)
    teacher_MV, student_MV = (
        spread * torch.randn(3, vocabulary, generator=generator, dtype=torch.float64) / temperature for _ in range(2)
    )
    whole = kl(teacher_MV, student_MV)
    bounds = []
    for top_k in range(1, vocabulary + 1):
        kept_MK = teacher_MV.topk(top_k, dim=1).indices
        bounds.append(kl(bucketed(teacher_MV, kept_MK), bucketed(student_MV, kept_MK)))
    assert all(low <= high + 1e-9 * (1 + whole) for low, high in itertools.pairwise(bounds))
    assert bounds[0] >= -1e-12
    assert bounds[-1] == pytest.approx(whole, rel=1e-9, abs=1e-12)


@given(st.integers(0, 10_000), st.integers(1, 9))
def test_buckets_hold_the_probability_of_all_tokens(seed, top_k):
    generator = torch.Generator().manual_seed(seed)
    logits_MV = 3 * torch.randn(4, 9, generator=generator, dtype=torch.float64)
    kept_MK = torch.stack([torch.randperm(9, generator=generator)[:top_k] for _ in range(4)])
    p_MB = bucketed(logits_MV, kept_MK).softmax(dim=1)
    for p_B, logits_V, kept_K in zip(p_MB, logits_MV, kept_MK.tolist(), strict=True):
        p_V = logits_V.softmax(dim=0)
        torch.testing.assert_close(p_B[:top_k], p_V[kept_K])
        if top_k < 9:
            torch.testing.assert_close(p_B[top_k], sum(p_V[token] for token in range(9) if token not in kept_K))


def test_a_student_that_is_the_teacher_has_no_distance_to_it(tiny_model, windows, batch, tmp_path):
    terms = Distillation(0.0, 1.0, 2.0, top_k=10).prepare(windows, lambda: tiny_model, tmp_path)(tiny_model, batch)
    assert float(terms["kl"]) == pytest.approx(0, abs=1e-5)


def test_the_prepared_objective_can_be_sent_to_another_process(tiny_model, windows, batch, tmp_path):
    objective = Distillation(0.5, 0.5, 2.0, top_k=10).prepare(windows, lambda: tiny_model, tmp_path)
    sent = pickle.loads(pickle.dumps(objective))
    assert torch.equal(sent(tiny_model, batch)["loss"], objective(tiny_model, batch)["loss"])


def test_a_student_of_another_vocabulary_is_a_model_error(tiny_model, windows, batch, tmp_path):
    objective = Distillation(0.5, 0.5, 2.0, top_k=10).prepare(windows, lambda: tiny_model, tmp_path)
    tiny_model.resize_token_embeddings(300)
    with pytest.raises(ModelError, match="teacher knows 257 tokens and the student 300"):
        objective(tiny_model, batch)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"temperature": 0.0}, "temperature=0"),
        ({"temperature": float("inf")}, "temperature=inf"),
        ({"top_k": 0}, "top_k=0"),
        ({"kl_weight": 0.0}, "does not distil"),
        ({"cross_entropy_weight": -0.1}, "does not distil"),
    ],
)
def test_settings_that_make_no_sense_are_input_errors(changes, reason):
    with pytest.raises(InputError, match=reason):
        Distillation(**{"cross_entropy_weight": 0.5, "kl_weight": 0.5, "temperature": 2.0, "top_k": 8, **changes})
