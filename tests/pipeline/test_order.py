"""The order of stages, and what each order asks of recovery and quantizer."""

import json
from dataclasses import dataclass, field

import pytest

from moeprune.errors import InputError
from moeprune.pipeline.order import PRUNE, QUANTIZE, RECOVER, check_after_pruning, check_order


@dataclass(frozen=True)
class Parts:
    embeddings: bool = False
    head: bool = False


@dataclass(frozen=True)
class Quantizer:
    parts: Parts = field(default_factory=Parts)


@dataclass(frozen=True)
class Recovery:
    merges: bool = True

    def check_quantized_base(self):
        if self.merges:
            raise InputError("Adapters cannot be merged.")


@pytest.mark.parametrize("order", [(RECOVER, PRUNE, QUANTIZE), (PRUNE, QUANTIZE), (PRUNE, RECOVER, RECOVER), ()])
def test_an_order_that_is_none_is_refused_and_the_possible_ones_are_named(order):
    with pytest.raises(InputError, match=r"order=\[prune,recover,quantize\]"):
        check_order(order)


@pytest.mark.parametrize("order", [[PRUNE, RECOVER, QUANTIZE], (PRUNE, QUANTIZE, RECOVER)])
def test_the_two_orders_are_possible(order):
    check_order(order)


@pytest.fixture
def dense(checkpoints):
    return checkpoints("qwen3_renormalised")  # its head is tied to its embeddings


def test_adapters_that_stay_beside_a_model_come_after_the_quantizer(dense):
    quantizer = Quantizer()
    with pytest.raises(InputError, match=r"recovery.merge=null, or order=\[prune,quantize,recover\]"):
        check_after_pruning([(RECOVER, Recovery(merges=False)), (QUANTIZE, quantizer)], dense)
    check_after_pruning([(QUANTIZE, quantizer), (RECOVER, Recovery(merges=False))], dense)
    check_after_pruning([(RECOVER, Recovery(merges=False))], dense)


def test_a_recovery_is_asked_whether_it_works_on_a_quantized_model_only_where_it_comes_later(dense):
    with pytest.raises(InputError, match="cannot be merged"):
        check_after_pruning([(QUANTIZE, Quantizer()), (RECOVER, Recovery())], dense)
    check_after_pruning([(RECOVER, Recovery()), (QUANTIZE, Quantizer())], dense)
    check_after_pruning([(RECOVER, Recovery())], dense)


@pytest.mark.parametrize("parts", [Parts(embeddings=True), Parts(head=True)])
def test_tied_embeddings_and_head_are_quantised_together(parts, dense, tmp_path):
    with pytest.raises(InputError, match="both to true, or both to false"):
        check_after_pruning([(QUANTIZE, Quantizer(parts))], dense)
    check_after_pruning([(QUANTIZE, Quantizer(Parts(embeddings=True, head=True)))], dense)
    untied = json.loads((dense / "config.json").read_text()) | {"tie_word_embeddings": False}
    (tmp_path / "config.json").write_text(json.dumps(untied))
    check_after_pruning([(QUANTIZE, Quantizer(parts))], tmp_path)
