"""GPTQ over whole models: which inputs each matrix is fitted to, held-out errors, and runs that are cut short."""

import logging
import os
import signal

import pytest
import torch
from families import FAMILIES, build_family
from kept_weights import kept_by

from moeprune.calibration.sample import Calibration
from moeprune.calibration.text import EmbeddedText
from moeprune.embedded.corpus import DOMAINS
from moeprune.errors import InputError, NumericalError
from moeprune.models.adapter import moe_layers
from moeprune.models.compressed.quantizable import QuantizedParts
from moeprune.models.compressed.reader import load_compressed
from moeprune.models.compressed.writer import CheckpointWriter, save_compressed
from moeprune.models.families import to_contract
from moeprune.models.layers.streaming import skeleton, stream_compressed
from moeprune.models.layers.walk import run_through, walk_layers
from moeprune.models.layers.workspace import IN_MEMORY, Workspace
from moeprune.models.runtime.grouped import GroupedLinear
from moeprune.models.source import ModelSource
from moeprune.quantization.gptq import GPTQQuantizer
from moeprune.quantization.gptq_solver import gptq, inverse_factor
from moeprune.quantization.grid import nearest
from moeprune.quantization.hessians import input_sums
from moeprune.quantization.rtn import NearestQuantizer
from moeprune.surgery.prune import prune
from moeprune.types import Plan

CPU = torch.device("cpu")


def cut_nothing(model):
    layers = moe_layers(model)
    everything = tuple(tuple(torch.arange(width) for width in layer.widths) for layer in layers)
    return prune(model, Plan(everything, layers[0].widths[0]))


@torch.no_grad()
def inputs_of(model, windows, names) -> dict[str, torch.Tensor]:
    """What enters these layers when the whole model runs on all windows, rows in any order; none of it is padding."""
    entered: dict[str, torch.Tensor] = {}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _module, inputs, name=name: entered.update({name: inputs[0].reshape(-1, inputs[0].shape[-1])})
        )
        for name in names
    ]
    model(windows.input_ids_NT)
    for hook in hooks:
        hook.remove()
    return entered


@pytest.mark.parametrize("scarcity", [0.0, 1.0])
@torch.no_grad()
def test_every_matrix_is_fitted_to_what_enters_it_behind_the_quantised_layers(pruned_64, random_windows, scarcity):
    """Codes are those of the solver for the inputs that hooks see when the layers before are quantised already."""
    quantizer = GPTQQuantizer("", bits=3, group_size=12, damping=0.02, scarcity=scarcity, fewest_tokens=12)
    model, wanted, checked, fallen_back = pruned_64, QuantizedParts().names(pruned_64), 0, 0
    weights = {name: linear.weight.clone() for name, linear in wanted.items()}
    layers = [name for name, module in model.named_modules() if name.rpartition(".")[0].endswith("layers")]
    entered = inputs_of(model, random_windows, wanted)
    for (_, layer_name, _), following in zip(quantizer(model, random_windows, 2), [*layers[1:], None], strict=True):
        for name in [name for name in wanted if name.startswith(f"{layer_name}.")]:
            found, x_NI = model.get_submodule(name), entered.get(name, torch.zeros(0, weights[name].shape[1]))
            if len(x_NI) < 12:
                expected = nearest(weights[name], bits=3, group_size=12)
            else:
                damping = 0.02 + scarcity * x_NI.shape[1] / len(x_NI)
                expected = gptq(weights[name], inverse_factor(x_NI.T @ x_NI, damping), bits=3, group_size=12)
            assert found.rounding == ("nearest" if len(x_NI) < 12 else "gptq")
            torch.testing.assert_close(found.weight, kept_by(expected, 12), rtol=1e-6, atol=1e-6, msg=name)
            checked, fallen_back = checked + 1, fallen_back + (len(x_NI) < 12)
        if following is not None:
            entered = inputs_of(model, random_windows, wanted)
    assert checked == len(wanted) and 0 < fallen_back < checked


def test_a_warning_says_how_many_matrices_of_which_layer_saw_too_few_tokens(pruned, random_windows, caplog):
    with caplog.at_level(logging.WARNING):
        run_through(GPTQQuantizer("gptq4", fewest_tokens=10**6)(pruned, random_windows, 2))
    matrices = [module for module in pruned.modules() if isinstance(module, GroupedLinear)]
    assert {matrix.rounding for matrix in matrices} == {"nearest"}
    counts = [int(record.getMessage().split(" of ")[0]) for record in caplog.records if "saw fewer" in record.message]
    assert sum(counts) == len(matrices)
    assert "matrices of model.layers.0 saw fewer than 1000000 tokens" in caplog.text


def test_without_a_matrix_that_saw_too_few_tokens_nothing_is_said(pruned, random_windows, caplog):
    with caplog.at_level(logging.WARNING):
        run_through(GPTQQuantizer("gptq4", fewest_tokens=1)(pruned, random_windows, 2))
    kinds = {module.rounding for module in pruned.modules() if isinstance(module, GroupedLinear)}
    assert ("nearest" in kinds) == ("saw fewer" in caplog.text)


@torch.no_grad()
def test_inputs_that_are_always_zero_are_rounded_to_nearest(build_model, random_windows):
    model = cut_nothing(build_model("qwen3_renormalised", torch.float32))
    for expert in moe_layers(model)[0].experts:
        expert.up_proj.weight.zero_()
    run_through(GPTQQuantizer("", fewest_tokens=1)(model, random_windows, 2))
    kinds = [{getattr(expert, part).rounding for expert in moe_layers(model)[0].experts} for part in
             ("gate_proj", "down_proj")]  # fmt: skip
    assert kinds == [{"gptq"}, {"nearest"}]


@torch.no_grad()
def test_inputs_with_nan_are_a_numerical_error(build_model, random_windows):
    model = cut_nothing(build_model("qwen3_renormalised", torch.float32))
    model.get_input_embeddings().weight[:] = torch.nan
    with pytest.raises(NumericalError, match=r"inputs of model\.layers\.0\.\S+ hold NaN or infinity"):
        run_through(GPTQQuantizer("")(model, random_windows, 2))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"damping": 0.0}, "damping=0.0"),
        ({"damping": float("inf")}, "damping=inf"),
        ({"damping": float("nan")}, "damping=nan"),
        ({"scarcity": float("inf")}, "scarcity=inf"),
        ({"scarcity": -1.0}, "scarcity=-1.0"),
        ({"fewest_tokens": 0}, "fewest_tokens=0"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(InputError, match=f"{message} is not possible"):
        GPTQQuantizer("", **settings)


def test_it_asks_for_windows(pruned):
    assert GPTQQuantizer.needs_calibration
    with pytest.raises(InputError, match="needs calibration windows"):
        GPTQQuantizer("")(pruned, None, 1)


@pytest.fixture(scope="module", params=["tiny_qwen3_moe", "tiny_deepseek_v2"])
def trained(request):
    """The last layer of an embedded model, and what enters its experts: on 40 windows, on 2, and on held-out text."""
    source = ModelSource(request.param, f"embedded:{request.param}", "bfloat16", "float32", 8, 16)
    model = cut_nothing(source.load())

    def sums(part, windows):
        calibration = Calibration(EmbeddedText(list(DOMAINS), part), windows, 128, 8, seed=0)
        batches = calibration.sample(source.tokenizer()).batches(8)
        last = next(visit for visit in walk_layers(model, batches, "test") if visit.layer is moe.decoder_layer)
        experts, slots = moe.name.removeprefix(f"{last.name}."), range(len(moe.experts))
        paths = [f"{experts}.{slot}.{matrix}" for slot in slots for matrix in ("gate_proj", "down_proj")]
        return {inputs.paths[0]: inputs for inputs in input_sums(last, paths, batches)}

    moe = moe_layers(model)[-1]
    return moe.decoder_layer, sums("training", 40), sums("training", 2), sums("validation", 40)


def held_out_errors(trained, bits, few, scarcity) -> torch.Tensor:
    """Squared output errors on held-out text of (GPTQ, nearest), for each matrix [N, 2]."""
    layer, many_sums, few_sums, held_out = trained
    errors = []
    for path, inputs in (few_sums if few else many_sums).items():
        if inputs.tokens < 16 or path not in held_out:
            continue
        weight_OI, hessian_II = layer.get_submodule(path).weight.detach(), held_out[path].sum_II.double()
        factor_II = inverse_factor(inputs.sum_II, 0.01 + scarcity * len(inputs.sum_II) / inputs.tokens)
        rounded = gptq(weight_OI, factor_II, bits=bits, group_size=64), nearest(weight_OI, bits=bits, group_size=64)
        differences = [kept_by(each, 64) - weight_OI for each in rounded]
        errors.append([float((each @ hessian_II * each).sum()) for each in differences])
    return torch.tensor(errors)


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_held_out_errors_of_a_trained_layer_are_below_those_of_nearest_rounding(trained, bits):
    errors_N2 = held_out_errors(trained, bits, few=False, scarcity=1.0)
    assert len(errors_N2) > 20
    assert (errors_N2[:, 0] < errors_N2[:, 1]).float().mean() > 0.95
    assert errors_N2[:, 0].sum() < 0.7 * errors_N2[:, 1].sum()


@pytest.mark.parametrize("bits", [4, 2])
def test_experts_of_few_tokens_lose_without_scarcity_and_gain_with_it(trained, bits):
    paper_N2, ours_N2 = (held_out_errors(trained, bits, few=True, scarcity=scarcity) for scarcity in (0.0, 1.0))
    assert paper_N2[:, 0].sum() > 1.2 * paper_N2[:, 1].sum()
    assert ours_N2[:, 0].sum() < ours_N2[:, 1].sum()


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_every_family_can_be_quantised(family, random_windows):
    """Biases, shared experts, dense layers, linear attention, gates that scale inputs."""
    model = build_family(family, torch.float32)
    to_contract(model)
    model = cut_nothing(model)
    biases = {name: value.clone() for name, value in model.named_parameters() if name.endswith("bias")}
    wanted = QuantizedParts().names(model)
    run_through(GPTQQuantizer("", bits=8, group_size=8, fewest_tokens=2)(model, random_windows, 2))
    assert {name for name, module in model.named_modules() if isinstance(module, GroupedLinear)} == wanted.keys()
    assert all(torch.equal(dict(model.named_parameters())[name], value) for name, value in biases.items())
    logits = model(random_windows.input_ids_NT).logits
    dense = build_family(family, torch.float32)(random_windows.input_ids_NT).logits
    assert (logits - dense).norm() < 0.2 * dense.norm()


@pytest.fixture
def finish(byte_tokenizer):
    """``finish(folder, model, quantizer, windows)``: quantises and writes a model layer by layer."""

    def write(folder, model, quantizer, windows, workspace=IN_MEMORY) -> None:
        folder.mkdir(exist_ok=True)
        writer = CheckpointWriter(folder, torch.float32)
        for finished_layer in quantizer(model, windows, 2, workspace):
            writer.add_layer(*finished_layer)
        writer.finish(skeleton(model), byte_tokenizer)

    return write


@pytest.fixture
def saved(pruned, byte_tokenizer, tmp_path):
    folder = tmp_path / "pruned"
    folder.mkdir()
    save_compressed(pruned, byte_tokenizer, folder, torch.float32)
    return folder


def assert_same_checkpoints(one, other) -> None:
    first, second = (load_compressed(folder, torch.float32).state_dict() for folder in (one, other))
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


@pytest.mark.parametrize(
    "quantizer",
    [
        GPTQQuantizer("gptq3", bits=3, fewest_tokens=4),
        GPTQQuantizer("gptq4 everywhere", fewest_tokens=4, parts=QuantizedParts(embeddings=True, head=True)),
        NearestQuantizer("rtn2", bits=2),
    ],
    ids=lambda one: one.name,
)
def test_layers_from_disk_are_quantised_as_those_in_memory_bit_for_bit(
    saved, random_windows, quantizer, finish, tmp_path
):
    finish(tmp_path / "memory", load_compressed(saved, torch.float32), quantizer, random_windows)
    streamed = stream_compressed(saved, torch.float32, (CPU,))
    finish(tmp_path / "streamed", streamed, quantizer, random_windows, Workspace(tmp_path / "walk"))
    assert_same_checkpoints(tmp_path / "memory", tmp_path / "streamed")
    experts = [layer.experts for layer in moe_layers(skeleton(streamed))]
    assert all(tensor.is_meta for each in experts for tensor in each.state_dict().values())


def test_a_killed_run_goes_on_where_it_was(saved, random_windows, finish, tmp_path):
    quantizer, last = GPTQQuantizer("gptq4", fewest_tokens=4), len(list(saved.glob("model-layer-*"))) - 1
    finish(tmp_path / "whole", stream_compressed(saved, torch.float32, (CPU,)), quantizer, random_windows)
    model, workspace = stream_compressed(saved, torch.float32, (CPU,)), Workspace(tmp_path / "walk", 0)
    (tmp_path / "killed").mkdir()
    child = os.fork()
    if child == 0:
        writer = CheckpointWriter(tmp_path / "killed", torch.float32)
        for depth, name, layer in quantizer(model, random_windows, 2, workspace):
            if depth == last:
                os.kill(os.getpid(), signal.SIGKILL)
            writer.add_layer(depth, name, layer)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert workspace.depth == last == len(list((tmp_path / "killed").glob("model-layer-*")))
    finish(tmp_path / "killed", model, quantizer, random_windows, workspace)
    assert_same_checkpoints(tmp_path / "whole", tmp_path / "killed")


def test_several_devices_fit_what_one_does(pruned_64, byte_tokenizer, padded_windows, tmp_path):
    """Two replicas on the CPU, a thread each."""
    quantizer = GPTQQuantizer("gptq4", fewest_tokens=4)
    save_compressed(pruned_64, byte_tokenizer, tmp_path, torch.float64)
    found = {}
    for _, name, layer in quantizer(stream_compressed(tmp_path, torch.float64, (CPU,) * 2), padded_windows, 2):
        found |= {f"{name}.{path}": tensor.clone() for path, tensor in layer.state_dict().items()}
    run_through(quantizer(pruned_64, padded_windows, 2))
    assert all(torch.equal(tensor, found[name]) for name, tensor in pruned_64.state_dict().items() if name in found)
