"""Weights of few bits in groups, against bit strings and loops over weights in float64."""

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional as F

from moeprune.models.runtime.grouped import (
    GroupedEmbedding,
    GroupedLinear,
    GroupedWeight,
    TiedHead,
    dequantise,
    grouped_embedding,
    grouped_linear,
    head_is_tied,
    pack,
    put_embedding,
    unpack,
)

BITS = st.integers(1, 8)
WIDTHS = st.integers(0, 40)


def random_parts(rows, columns, bits, group_size, seed=0):
    """Codes, scales and zeros; zeros between two codes too."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (rows, columns), generator=generator, dtype=torch.uint8)
    groups = math.ceil(columns / group_size)
    scales = (torch.rand(rows, groups, generator=generator) / 8 + 2**-10).half()
    zeros = (torch.rand(rows, groups, generator=generator) * (2**bits - 1)).half()
    return codes, scales, zeros


def weights_one_by_one(codes, scales, zeros, group_size) -> torch.Tensor:
    rows, columns = codes.shape
    weight = torch.zeros(rows, columns, dtype=torch.float64)
    for row in range(rows):
        for column in range(columns):
            scale, zero = scales[row, column // group_size].double(), zeros[row, column // group_size].double()
            weight[row, column] = (int(codes[row, column]) - zero) * scale
    return weight


def linear(rows=12, columns=30, bits=3, group_size=8, bias=False, dtype=torch.float32, seed=0) -> GroupedLinear:
    parts = random_parts(rows, columns, bits, group_size, seed)
    bias_O = torch.randn(rows, generator=torch.Generator().manual_seed(seed)).to(dtype) if bias else None
    return grouped_linear(*parts, bias_O, bits=bits, group_size=group_size, rounding="nearest", dtype=dtype)


def table(rows=20, columns=12, bits=4, dtype=torch.float32) -> GroupedEmbedding:
    parts = random_parts(rows, columns, bits, 8)
    return grouped_embedding(*parts, bits=bits, group_size=8, rounding="nearest", dtype=dtype)


@given(BITS, st.integers(0, 5), WIDTHS, st.integers(0, 99))
def test_codes_lie_one_after_the_other_lowest_bits_first(bits, rows, count, seed):
    codes, _, _ = random_parts(rows, count, bits, 8, seed)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8 and tuple(packed.shape) == (rows, math.ceil(count * bits / 8))
    for row in range(rows):
        whole = sum(int(code) << (bits * place) for place, code in enumerate(codes[row]))
        assert bytes(packed[row].tolist()) == whole.to_bytes(packed.shape[1], "little")
    assert torch.equal(unpack(packed, bits, count), codes)


@given(BITS, st.integers(0, 4), WIDTHS, st.integers(1, 24), st.integers(0, 99))
def test_weights_are_those_of_a_loop_in_float64(bits, rows, columns, group_size, seed):
    codes, scales, zeros = random_parts(rows, columns, bits, group_size, seed)
    actual = dequantise(codes, scales, zeros, group_size)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(
        actual.double(), weights_one_by_one(codes, scales, zeros, group_size), rtol=1e-6, atol=1e-7
    )


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("rows", "columns"), [(7, 30), (0, 30), (7, 0), (1, 1), (16, 64)])
@pytest.mark.parametrize("bias", [False, True])
def test_a_product_is_that_of_the_weights_in_float64(bits, rows, columns, bias):
    layer = linear(rows, columns, bits, bias=bias)
    codes, scales, zeros = random_parts(rows, columns, bits, 8)
    x = torch.randn(2, 3, columns, dtype=torch.float64)
    expected = x @ weights_one_by_one(codes, scales, zeros, 8).T + (layer.bias.double() if bias else 0)
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-6)
    assert layer(x.float()).dtype == torch.float32 and tuple(layer.weight.shape) == (rows, columns)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_computes_in_the_precision_of_its_inputs_with_weights_rounded_once(dtype):
    layer, x = linear(), torch.randn(4, 30).to(dtype)
    assert torch.equal(layer(x), F.linear(x, layer.weight.to(dtype)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_gpu_has_the_same_weights_bit_for_bit(dtype):
    layer = linear(64, 200, bias=True)
    embedding, ids = table(), torch.tensor([[1, 5, 0]])
    weight, rows, x = layer.weight.to(dtype), embedding(ids), torch.randn(3, 200).to(dtype)
    expected = layer(x)
    layer.cuda(), embedding.cuda()
    assert torch.equal(layer.weight.to(dtype).cpu(), weight)
    assert torch.equal(embedding(ids.cuda()).cpu(), rows)
    torch.testing.assert_close(layer(x.cuda()).cpu(), expected, rtol=2e-2, atol=2e-2)


def test_three_bits_take_three_bits():
    layer = linear(16, 64, bits=3, group_size=64)
    assert layer.codes.nbytes * 8 == 3 * 16 * 64
    assert layer.scales.nbytes == layer.zeros.nbytes == 2 * 16


def test_gradients_of_inputs_are_those_of_a_plain_layer_and_no_weights_are_kept_for_them():
    layer, kept = linear(bias=True, dtype=torch.float64), []
    x = torch.randn(5, 30, dtype=torch.float64, requires_grad=True)
    gradient = torch.randn(5, 12, dtype=torch.float64)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x).backward(gradient)
    actual, x.grad = x.grad, None
    F.linear(x, layer.weight, layer.bias).backward(gradient)
    torch.testing.assert_close(actual, x.grad)
    assert kept == []
    assert torch.autograd.gradcheck(layer, x)


def test_autocast_makes_it_compute_in_fewer_bits():
    layer, x = linear(bias=True), torch.randn(4, 30, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.bfloat16().sum(0).float().expand(4, -1), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_casting_a_module_rounds_no_scale(dtype):
    layer = linear(bias=True)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    cast = copy.deepcopy(layer).to(dtype)
    assert all(torch.equal(cast.state_dict()[name], before[name]) for name in ("codes", "scales", "zeros"))
    assert cast.weight.dtype == cast.bias.dtype == cast.dtype == dtype
    assert torch.equal(cast.weight, layer.weight.to(dtype))


def test_its_state_makes_the_same_layer_again():
    layer = linear(bias=True)
    with torch.device("meta"):
        empty = GroupedLinear(30, 12, 3, 8, "nearest")
    assert empty.weight.is_meta and empty.storage == layer.storage
    empty.load_state_dict(layer.state_dict(), assign=True)
    x = torch.randn(2, 30)
    assert torch.equal(empty(x), layer(x))


@pytest.mark.parametrize(("bits", "group_size"), [(0, 8), (9, 8), (4, 0)])
def test_impossible_bits_and_groups_are_refused(bits, group_size):
    with pytest.raises(ValueError, match="not possible"):
        GroupedLinear(4, 4, bits, group_size, "nearest")


def test_parts_that_do_not_fit_are_refused():
    codes, scales, zeros = random_parts(4, 20, 4, 8)
    settings = {"bits": 4, "group_size": 8, "rounding": "nearest", "dtype": torch.float32}
    for wrong in ((codes, scales[:, :1], zeros), (codes, scales, zeros[:2]), (codes, scales.float(), zeros)):
        with pytest.raises(ValueError, match="were expected"):
            grouped_linear(*wrong, None, **settings)


@given(st.lists(st.integers(0, 19), max_size=6), BITS)
def test_rows_looked_up_are_rows_of_the_table(ids, bits):
    embedding = table(bits=bits, dtype=torch.bfloat16)
    found = embedding(torch.tensor([ids], dtype=torch.int64))
    assert torch.equal(found, embedding.weight[torch.tensor([ids], dtype=torch.int64)])
    assert found.dtype == torch.bfloat16 and tuple(found.shape) == (1, len(ids), 12)


def test_a_tied_head_holds_nothing_and_follows_its_table():
    embedding = table()
    model = nn.ModuleDict({"table": embedding, "head": TiedHead(embedding)})
    assert not any(name.startswith("head") for name in model.state_dict())
    x = torch.randn(3, 12)
    for form in (copy.deepcopy(model), model.to(torch.bfloat16)):
        expected = F.linear(x, form["table"].weight.float())
        torch.testing.assert_close(form["head"](x), expected, rtol=1e-2, atol=1e-2)
        form["table"].scales.zero_()
        assert not form["head"](x).any()


@pytest.mark.parametrize("replaced", [False, True])
def test_whether_a_head_is_tied_is_known_before_and_after(tiny_model, model_name, replaced):
    tied = model_name != "deepseek_v2"
    if replaced:
        put_embedding(tiny_model, table(257, 32))
        assert isinstance(tiny_model.get_output_embeddings(), TiedHead) == tied
        assert isinstance(tiny_model.get_input_embeddings(), GroupedWeight)
    assert head_is_tied(tiny_model) == tied


def test_layers_on_top_of_it_train_as_they_do_on_a_plain_layer():
    """What PEFT does: it reads the weight, and adds to what the layer gives."""
    config = LoraConfig(target_modules=["0"], r=2, use_dora=True, init_lora_weights=False)
    layer = linear()
    plain = nn.Linear(30, 12, bias=False)
    plain.weight.data.copy_(layer.weight)
    models = []
    for base in (layer, plain):
        torch.manual_seed(0)
        models.append(get_peft_model(nn.Sequential(base, nn.LayerNorm(12)), config))
    x = torch.randn(4, 30)
    outputs = [model(x) for model in models]
    torch.testing.assert_close(*outputs)
    for output in outputs:
        output.square().sum().backward()
    first, second = ([p.grad for p in model.parameters() if p.requires_grad] for model in models)
    assert len(first) == len(second) == 3
    for one, other in zip(first, second, strict=True):
        torch.testing.assert_close(one, other)
