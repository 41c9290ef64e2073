"""Writes the model card of an embedded model; every number in it is measured, or is a setting of the run itself.

Axis letters: L MoE layers, E routed experts, N windows, W tokens of a window, V vocabulary.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from moeprune.embedded.corpus import training_text, validation_text
from moeprune.embedded.ngram import bigram_perplexity, bigram_VV, unigram_perplexity, unigram_V
from moeprune.embedded.recipe import token_ids
from moeprune.embedded.tasks import CHANCE_OF_TASK, ITEMS_PER_DOMAIN, SENTENCE_DOMAINS
from moeprune.models.adapter import moe_layers, recorded_routing
from moeprune.training.balance import expert_load_LE
from moeprune.training.loop import TrainingSettings

WINDOW_TOKENS = 128
WINDOWS_PER_DOMAIN = 125
LOSS_ROWS = 8

SOURCE_OF_DOMAIN = {
    "prose": "Jane Austen's six novels and Herman Melville's Moby-Dick (public domain)",
    "scripture": "King James Bible (public domain outside the United Kingdom)",
    "speeches": "State of the Union addresses (public domain)",
    "code": "sources of the Python standard library (PSF licence)",
    "arithmetic": "generated sums, products, sequences, sorting and copying",
}


@dataclass(frozen=True)
class DomainMeasurement:
    """One domain: its tokens, perplexities on held-out windows, and each expert's share of them [L, E]."""

    training_tokens: int
    validation_tokens: int
    model: float
    bigram: float
    unigram: float
    load_LE: Tensor


def write_model_card(
    folder: Path,
    run_dir: Path,
    domain_weights: Mapping[str, float],
    settings: TrainingSettings,
    accuracies: Mapping[str, float] | None = None,
) -> Path:
    """Write ``README.md`` and ``loss_curve.png`` into a trained model's folder; returns the path of the card.

    ``run_dir`` holds the ``loss_curve.jsonl`` of the run that trained the model with these weights and settings;
    ``accuracies`` are those of the embedded tasks, by task name.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    curve = [json.loads(line) for line in (run_dir / "loss_curve.jsonl").read_text().splitlines()]
    plot_loss_curve(curve, folder / "loss_curve.png")
    measured = {domain: measure_domain(model, tokenizer, domain) for domain in domain_weights}
    sections = [
        _introduction(folder, model),
        _architecture(model),
        _data(measured, domain_weights, settings),
        _recipe(settings, curve),
        _perplexity(measured),
        _tasks(accuracies or {}),
        _expert_load(model, measured),
    ]
    card = folder / "README.md"
    card.write_text("\n".join(sections), encoding="utf-8")
    return card


def measure_domain(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, domain: str) -> DomainMeasurement:
    """Perplexity of the model and of n-gram models fitted on this domain's training tokens, and expert load.

    All three predict the same tokens: those after ``<|endoftext|>`` in at most 125 windows of 128 tokens.
    """
    training_tokens = token_ids(tokenizer, training_text(domain))
    windows_NW = _validation_windows(tokenizer, domain)
    input_ids_NW = torch.from_numpy(windows_NW)
    with torch.no_grad(), recorded_routing(model) as routing:
        logits_NWV = model(input_ids=input_ids_NW, use_cache=False).logits
    loss = functional.cross_entropy(logits_NWV[:, :-1].flatten(0, 1), input_ids_NW[:, 1:].flatten())
    vocab_size = model.config.vocab_size
    return DomainMeasurement(
        training_tokens=len(training_tokens),
        validation_tokens=windows_NW[:, 1:].size,
        model=math.exp(loss.item()),
        bigram=bigram_perplexity(bigram_VV(training_tokens, vocab_size), windows_NW),
        unigram=unigram_perplexity(unigram_V(training_tokens, vocab_size), windows_NW),
        load_LE=expert_load_LE(routing),
    )


def _validation_windows(tokenizer: PreTrainedTokenizerFast, domain: str) -> np.ndarray:
    body = WINDOW_TOKENS - 1
    ids = token_ids(tokenizer, validation_text(domain)).astype(np.int64)
    count = min(WINDOWS_PER_DOMAIN, len(ids) // body)
    windows = ids[: count * body].reshape(count, body)
    return np.insert(windows, 0, tokenizer.bos_token_id, axis=1)


def plot_loss_curve(curve: Sequence[Mapping[str, float]], path: Path) -> None:
    """Training loss and load-balancing loss over the steps, one above the other."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    steps = [point["step"] for point in curve]
    upper.plot(steps, [point["loss"] for point in curve], linewidth=1)
    upper.set_ylabel("loss (nats per token)")
    lower.plot(steps, [point["balance"] for point in curve], linewidth=1, color="tab:orange")
    lower.set_ylabel("load balance")
    lower.set_xlabel("step")
    for axes in (upper, lower):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def _introduction(folder: Path, model: PreTrainedModel) -> str:
    name = folder.name
    return f"""---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
tags: [mixture-of-experts, pruning, tiny]
---

# {name}

A {model.num_parameters() / 1e6:.1f}M-parameter Mixture-of-Experts language model, small enough to prune, quantise and
evaluate on a CPU, and trained far enough that doing so has measurable effects. It is meant for tests, examples and the
study of compression methods, not for producing text: it knows only the kinds of text listed below, and reflects the
views of their authors.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
```

Weights are in bfloat16; everything below was measured in float32 on these weights. Training windows began with
`<|endoftext|>`, which the tokenizer does not add by itself.
"""


def _architecture(model: PreTrainedModel) -> str:
    layers = moe_layers(model)
    config = model.config
    total = model.num_parameters()
    routed = [sum(p.numel() for p in layer.experts.parameters()) for layer in layers]
    idle = sum(count * (1 - layer.top_k / layer.expert_count) for count, layer in zip(routed, layers, strict=True))
    rows = [
        ("family", type(model).__name__),
        ("decoder layers", f"{config.num_hidden_layers}, of which {len(layers)} with routed experts"),
        ("routed experts of a layer", f"{layers[0].expert_count} of width {layers[0].widths[0]}"),
        ("experts of a token", layers[0].top_k),
        ("shared experts of a layer", getattr(config, "n_shared_experts", 0)),
        ("hidden size", config.hidden_size),
        ("attention heads", config.num_attention_heads),
        ("vocabulary", f"{config.vocab_size} (byte-level BPE, single digits)"),
        ("parameters", f"{total:,}"),
        ("of these in routed experts", f"{sum(routed):,} ({sum(routed) / total:.1%})"),
        ("active for a token", f"{total - round(idle):,} ({1 - idle / total:.1%})"),
    ]
    return "## Architecture\n\n" + _table(("", ""), rows)


def _data(
    measured: Mapping[str, DomainMeasurement], domain_weights: Mapping[str, float], settings: TrainingSettings
) -> str:
    seen = settings.steps * settings.batch_size * (settings.sequence_length - 1)
    rows = []
    for domain, weight in domain_weights.items():
        share = weight / sum(domain_weights.values())
        available = measured[domain].training_tokens
        rows.append(
            (domain, SOURCE_OF_DOMAIN[domain], f"{share:.0%}", f"{available:,}", f"{share * seen / available:.2f}")
        )
    header = ("domain", "text", "share of windows", "training tokens", "passes over them")
    return f"""## Data

{seen:,} tokens were seen, in windows drawn from five domains with fixed shares.

{_table(header, rows)}
Every twentieth block of 50 lines is held out, alternately for perplexity and for the tasks; held-out lines that also
occur in the training text are dropped.
"""


def _recipe(settings: TrainingSettings, curve: Sequence[Mapping[str, float]]) -> str:
    chosen = sorted({round(i * (len(curve) - 1) / (LOSS_ROWS - 1)) for i in range(LOSS_ROWS)})
    points = [(curve[i]["step"], f"{curve[i]['loss']:.3f}", f"{curve[i]['balance']:.3f}") for i in chosen]
    settings_rows = [(name.replace("_", " "), value) for name, value in asdict(settings).items()]
    return f"""## Training

AdamW (0.9, 0.95) in float32; linear warm-up, constant rate, linear decay to zero over the last part; next-token
cross-entropy plus a load-balancing loss per layer, which is 1 when all experts of a layer are used equally.

{_table(("setting", "value"), settings_rows)}
![Loss and load balance over the steps](loss_curve.png)

{_table(("step", "loss (nats per token)", "load balance"), points)}"""


def _perplexity(measured: Mapping[str, DomainMeasurement]) -> str:
    rows = [
        (domain, f"{m.validation_tokens:,}", f"{m.model:.2f}", f"{m.bigram:.1f}", f"{m.unigram:.1f}")
        for domain, m in measured.items()
    ]
    return f"""## Perplexity on held-out text

`exp` of the mean negative log-likelihood in nats per token, in windows of {WINDOW_TOKENS} tokens. The n-gram models
are fitted on the same domain's training tokens: an add-one unigram, and a bigram interpolated with it (Witten-Bell).

{_table(("domain", "tokens", "this model", "bigram", "unigram"), rows)}"""


def _tasks(accuracies: Mapping[str, float]) -> str:
    if not accuracies:
        return ""
    items = ITEMS_PER_DOMAIN * len(SENTENCE_DOMAINS)
    rows = [
        (task, f"{accuracy:.3f}", f"{math.sqrt(accuracy * (1 - accuracy) / items):.3f}", f"{CHANCE_OF_TASK[task]:.2f}")
        for task, accuracy in accuracies.items()
    ]
    return f"""## Tasks

Multiple choice on held-out text, {items} items each, without examples in the prompt.

{_table(("task", "accuracy", "standard error", "chance"), rows)}"""


def _expert_load(model: PreTrainedModel, measured: Mapping[str, DomainMeasurement]) -> str:
    load_LE = torch.stack([m.load_LE for m in measured.values()]).mean(dim=0)
    balanced = 1 / load_LE.shape[1]
    rows = [
        (layer.name, f"{load_E.min():.4f}", f"{load_E.max():.4f}", int((load_E == 0).sum()))
        for layer, load_E in zip(moe_layers(model), load_LE, strict=True)
    ]
    return f"""## Expert load

Share of routed assignments that a layer's least and most used expert receive on the held-out windows, all domains
weighing the same; a balanced expert has {balanced:.4f}. A dead expert is never chosen.

{_table(("layer", "least used", "most used", "dead experts"), rows)}"""


def _table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(str(cell) for cell in line)} |\n" for line in lines)
