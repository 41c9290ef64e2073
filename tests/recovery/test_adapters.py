"""Adapters on pruned models: where they are, what trains, merging, and what a checkpoint keeps of them."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from families import FAMILIES, VOCAB_SIZE, build_family
from safetensors import safe_open

from moeprune.errors import InputError, ModelError
from moeprune.export.checkpoint import open_checkpoint
from moeprune.models.adapter import moe_layers, recorded_routing
from moeprune.models.compressed.adapters import adapted_layers, adapter_parameters, merge_adapters
from moeprune.models.compressed.reader import load_compressed
from moeprune.models.compressed.writer import save_compressed
from moeprune.models.footprint.measured import count_bytes, count_parameters
from moeprune.models.layers.streaming import stream_compressed
from moeprune.models.runtime.contract import to_contract
from moeprune.recovery.adapters import EXPERTS, ROUTERS
from moeprune.surgery.prune import prune
from moeprune.types import Plan


def logits(model, token_ids):
    with torch.no_grad():
        return model(input_ids=token_ids, use_cache=False).logits


def relative(after, before):
    return float((after - before).norm() / before.norm())


def test_attached_adapters_change_nothing_yet(pruned, adapters, token_ids):
    model, plain = pruned(torch.float32), pruned(torch.float32)
    adapters().attach(model, seed=0)
    assert torch.equal(logits(model, token_ids), logits(plain, token_ids))
    assert model.config.model_type == plain.config.model_type and "model_type" not in vars(model.config)


def test_an_adapted_model_is_still_seen_as_one_of_its_family(pruned, adapters, token_ids):
    model, plain = pruned(torch.float32), pruned(torch.float32)
    adapters().attach(model, seed=0)
    found, expected = moe_layers(model), moe_layers(plain)
    for name in ("name", "widths", "stored_widths", "hidden_size", "top_k", "routes_by_group"):
        assert [getattr(layer, name) for layer in found] == [getattr(layer, name) for layer in expected]
    with recorded_routing(model) as routing:
        logits(model, token_ids)
    with recorded_routing(plain) as routing_of_plain:
        logits(plain, token_ids)
    assert len(routing) == len(found)
    for one, other in zip(routing, routing_of_plain, strict=True):
        assert torch.equal(one.experts_TK, other.experts_TK)


def test_adapters_are_on_the_experts_that_have_channels_and_on_the_routers(pruned, adapters):
    model = pruned(torch.float32)
    expected = {
        f"{layer.name}.{slot}.{part}_proj"
        for layer in moe_layers(model)
        for slot, width in enumerate(layer.stored_widths)
        for part in ("gate", "up", "down")
        if width
    }
    routers = {id(layer.router) for layer in moe_layers(model)}
    expected |= {name for name, module in model.named_modules() if id(module) in routers}
    adapters().attach(model, seed=0)
    assert adapted_layers(model).keys() == expected
    assert {0, 8, 16} <= set(moe_layers(model)[1].stored_widths)


def test_each_group_trains_at_its_own_rate_and_nothing_else_trains(pruned, adapters):
    model = pruned(torch.float32)
    settings = adapters(learning_rate=1e-4, router_learning_rate=1e-6)
    settings.attach(model, seed=0)
    groups = {group.name: group for group in settings.groups(model)}
    assert {name: group.learning_rate for name, group in groups.items()} == {EXPERTS: 1e-4, ROUTERS: 1e-6}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    in_routers = {names[id(parameter)] for parameter in groups[ROUTERS].parameters}
    in_experts = {names[id(parameter)] for parameter in groups[EXPERTS].parameters}
    assert {name.split(".")[-2] for name in in_experts} == {EXPERTS}
    assert all(".experts." not in name for name in in_routers)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == in_routers | in_experts and not in_routers & in_experts
    matrices = 3 * sum(width > 0 for layer in moe_layers(model) for width in layer.stored_widths)
    assert (len(in_experts), len(in_routers)) == (3 * matrices, 2 * len(moe_layers(model)))


def test_without_a_router_rank_routers_have_no_adapter(pruned, adapters):
    model = pruned(torch.float32)
    settings = adapters(router_rank=0)
    settings.attach(model, seed=0)
    assert [group.name for group in settings.groups(model)] == [EXPERTS]


def test_adapters_are_drawn_from_their_seed_alone(pruned, adapters):
    drawn = []
    for seed, state in [(0, 1), (0, 2), (1, 1)]:
        torch.manual_seed(state)
        model = pruned(torch.float32)
        before = torch.get_rng_state()
        adapters().attach(model, seed)
        assert torch.equal(before, torch.get_rng_state())
        drawn.append(torch.cat([value.flatten() for value in adapter_parameters(model, EXPERTS).values()]))
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize("settings", [{"rank": 0}, {"router_rank": -1}, {"dropout": 1.0}])
def test_impossible_settings_are_refused(adapters, settings):
    with pytest.raises(InputError):
        adapters(**settings)


@pytest.mark.parametrize("use_dora", [True, False])
def test_merged_computes_what_unmerged_does(pruned, adapters, shaken, token_ids, use_dora):
    model, plain = pruned(torch.float64), pruned(torch.float64)
    adapters(use_dora=use_dora).attach(model, seed=0)
    shaken(model)
    unmerged = logits(model, token_ids)
    assert relative(unmerged, logits(plain, token_ids)) > 0.05
    merge_adapters(model)
    assert relative(logits(model, token_ids), unmerged) < 1e-6  # the routers' softmax is in float32
    assert not adapted_layers(model) and not hasattr(model, "peft_config")
    untouched = {name for name in plain.state_dict() if "experts" not in name and "gate.weight" not in name}
    for name in untouched:
        assert torch.equal(model.state_dict()[name], plain.state_dict()[name]), name
    assert model.state_dict().keys() == plain.state_dict().keys()


def test_a_broken_adapter_is_not_merged(pruned, adapters):
    model = pruned(torch.float32)
    adapters(use_dora=False).attach(model, seed=0)
    next(iter(adapter_parameters(model, EXPERTS).values())).data.fill_(torch.nan)
    with pytest.raises(ModelError, match="cannot be merged"):
        merge_adapters(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_fit_every_family(family, adapters, shaken):
    model = build_family(family)
    to_contract(model)
    kept = tuple(
        tuple(torch.arange(8 if expert % 2 else 24) for expert in range(layer.expert_count))
        for layer in moe_layers(model)
    )
    prune(model, Plan(kept, 24))
    token_ids = torch.randint(1, VOCAB_SIZE, (2, 9), generator=torch.Generator().manual_seed(0))
    plain = logits(model, token_ids)
    settings = adapters()
    settings.attach(model, seed=0)
    assert torch.equal(logits(model, token_ids), plain)
    assert [group.name for group in settings.groups(model)] == [EXPERTS, ROUTERS]
    shaken(model)
    unmerged = logits(model, token_ids)
    assert relative(unmerged, plain) > 0.01
    model.train()(input_ids=token_ids, labels=token_ids).loss.backward()
    # Phi's routers choose so sharply that the gradient of most tokens is 0.
    assert all(parameter.grad.isfinite().all() for parameter in settings.groups(model)[1].parameters)
    merge_adapters(model.eval())
    assert relative(logits(model, token_ids), unmerged) < 1e-5


def test_gradient_checkpointing_changes_no_gradient(pruned, adapters, shaken, token_ids):
    gradients = []
    for checkpointing in (False, True):
        model = pruned(torch.float64)
        adapters().attach(model, seed=0)
        shaken(model)
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(0)
        model(input_ids=token_ids, labels=token_ids, use_cache=False).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("use_dora", [True, False])
def test_adapters_train_on_quantised_weights(quantized, adapters, token_ids, use_dora):
    model, plain = quantized(), quantized()
    adapters(use_dora=use_dora).attach(model, seed=0)
    assert relative(logits(model, token_ids), logits(plain, token_ids)) < 1e-6
    before = {name: value.clone() for name, value in plain.state_dict().items()}
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(input_ids=token_ids, labels=token_ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    after = {name.replace(".base_layer", ""): value for name, value in model.state_dict().items()}
    for name, value in before.items():
        assert torch.equal(after[name], value), name


def contents(file):
    """What a file holds; the order of a safetensors file's metadata is left to chance."""
    if file.suffix != ".safetensors":
        return file.read_bytes()
    with safe_open(file, "pt") as stored:
        return stored.metadata(), {name: stored.get_tensor(name).tolist() for name in stored.keys()}  # noqa: SIM118


@pytest.fixture
def kept(pruned, adapters, shaken, byte_tokenizer, tmp_path):
    """A model with adapters in bfloat16 values, and the folder that it was written to."""
    model = pruned(torch.float32)
    adapters().attach(model, seed=0)
    shaken(model)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16).float()
    folder = tmp_path / "kept"
    folder.mkdir()
    save_compressed(model, byte_tokenizer, folder, torch.bfloat16)
    return model, folder


def test_a_checkpoint_keeps_adapters_exactly(kept, token_ids):
    model, folder = kept
    loaded = load_compressed(folder, torch.float32)
    assert torch.equal(logits(loaded, token_ids), logits(model, token_ids))
    assert not loaded.training and not any(module.training for module in loaded.modules())
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert loaded.state_dict().keys() == model.state_dict().keys()


def test_on_quantised_weights_too(quantized, adapters, shaken, byte_tokenizer, tmp_path, token_ids):
    model = quantized()
    adapters().attach(model, seed=0)
    shaken(model)
    save_compressed(model, byte_tokenizer, tmp_path, torch.float32)
    loaded = load_compressed(tmp_path, torch.float32)
    assert torch.equal(logits(loaded, token_ids), logits(model, token_ids))


def test_the_weights_beside_adapters_are_those_of_the_model_without(kept, pruned, byte_tokenizer, tmp_path):
    _, folder = kept
    plain = tmp_path / "plain"
    plain.mkdir()
    save_compressed(pruned(torch.float32), byte_tokenizer, plain, torch.bfloat16)
    names = {file.name for file in plain.iterdir()}
    assert {file.name for file in folder.iterdir()} == names | {"adapters"}
    for name in names - {"config.json"}:
        assert contents(folder / name) == contents(plain / name), name
    config = json.loads((folder / "config.json").read_text())
    assert set(config.pop("adapters")) == {EXPERTS, ROUTERS}
    assert config == json.loads((plain / "config.json").read_text())


def test_adapters_count_among_bytes_and_parameters(kept, pruned):
    _, folder = kept
    loaded = load_compressed(folder, torch.float32)
    plain = pruned(torch.float32)
    added = sum(p.numel() for name in (EXPERTS, ROUTERS) for p in adapter_parameters(loaded, name).values())
    assert count_parameters(loaded).total == count_parameters(plain).total + added
    stored = sum(p.numel() for p in plain.parameters()) + added
    assert count_bytes(folder, loaded).with_overhead == 2 * stored


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_config.json"])
def test_a_missing_or_damaged_adapter_is_an_error(kept, file):
    _, folder = kept
    victim = folder / "adapters" / EXPERTS / file
    victim.write_bytes(victim.read_bytes()[:100])
    with pytest.raises(ModelError, match="adapter"):
        load_compressed(folder, torch.float32)
    victim.unlink()
    with pytest.raises(ModelError, match=f"adapters/{EXPERTS}/{file}"):
        load_compressed(folder, torch.float32)


def test_an_adapter_of_another_model_is_an_error(kept):
    _, folder = kept
    shutil.copy(folder / "adapters" / ROUTERS / "adapter_model.safetensors", folder / "adapters" / EXPERTS)
    with pytest.raises(ModelError, match="do not fit"):
        load_compressed(folder, torch.float32)


def test_a_model_with_adapters_is_not_streamed(kept):
    with pytest.raises(ModelError, match=r"model\.streaming=never"):
        stream_compressed(kept[1], torch.float32, (torch.device("cpu"),))


def test_a_model_with_adapters_is_not_exported(kept):
    with pytest.raises(InputError, match="adapters beside its weights"):
        open_checkpoint(kept[1])


WITHOUT_US = """
import sys
sys.modules["moeprune"] = None
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
folder, token_ids, dtype = sys.argv[1], torch.tensor(eval(sys.argv[2])), torch.float32
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=dtype)
model = PeftModel.from_pretrained(model, f"{folder}/adapters/experts", adapter_name="experts")
model.load_adapter(f"{folder}/adapters/routers", adapter_name="routers")
model.base_model.set_adapter(["experts", "routers"])
with torch.no_grad():
    torch.save(model.eval()(input_ids=token_ids).logits, sys.argv[3])
"""


@pytest.mark.parametrize("model_name", ["deepseek_v2"], indirect=True)
def test_peft_reads_the_adapters_where_this_package_is_not_installed(kept, token_ids, tmp_path):
    model, folder = kept
    result = tmp_path / "logits.pt"
    command = [sys.executable, "-c", WITHOUT_US, str(folder), str(token_ids.tolist()), str(result)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path("/"))
    assert done.returncode == 0, done.stderr
    assert relative(torch.load(result, weights_only=True), logits(model, token_ids)) < 1e-5
