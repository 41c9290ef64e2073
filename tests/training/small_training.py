"""A small network with dropout and experts that not every batch reaches, windows for it, and how it is trained."""

from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

from moeprune.training.data import NO_LABEL, LabelledWindows
from moeprune.training.fine_tuning import FineTuning, ParameterGroup, fit

VOCABULARY, HIDDEN, EXPERTS = 40, 6, 8

SETTINGS = FineTuning(
    epochs=2, batch_size=4, micro_batch_size=2, checkpoint_every_steps=3, checkpoint_every_min=None, log_every=2, seed=5
)  # 11 windows: 3 steps an epoch, the last of 3 windows


class Layer(nn.Module):
    """Sends token t to expert t % E alone, so that an expert has no gradient where its tokens do not occur."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(HIDDEN, HIDDEN) for _ in range(EXPERTS)])
        self.unused = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, h_BTH, input_ids_BT):
        expert_BT = input_ids_BT % EXPERTS
        routed = torch.zeros_like(h_BTH)
        for index in expert_BT.unique().tolist():
            here = expert_BT == index
            routed = routed.index_put((here,), self.experts[index](h_BTH[here]).to(routed.dtype))
        return h_BTH + torch.tanh(routed)


class Network(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, HIDDEN)
        self.layers = nn.ModuleList([Layer(), Layer()])
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(HIDDEN, VOCABULARY)

    def forward(self, input_ids):
        h_BTH = self.embedding(input_ids)
        for layer in self.layers:
            h_BTH = self.dropout(layer(h_BTH, input_ids))
        return self.head(h_BTH)


def network(dtype=torch.float64, dropout=0.0) -> Network:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Network(dropout).to(dtype)


def groups_of(model) -> list[ParameterGroup]:
    """Everything but the embedding, at two rates."""
    return [
        ParameterGroup("layers", list(model.layers.parameters()), 1e-2),
        ParameterGroup("head", list(model.head.parameters()), 3e-3),
    ]


def labelled_windows(count=11, length=7, seed=1) -> LabelledWindows:
    """Windows with differently many labels, first the prompts without, then some, then padding without."""
    generator = torch.Generator().manual_seed(seed)
    input_ids_NT = torch.randint(0, VOCABULARY, (count, length), generator=generator)
    labels_NT = input_ids_NT.clone()
    for row in range(count):
        labels_NT[row, : row % 3] = NO_LABEL
        labels_NT[row, length - row % 4 :] = NO_LABEL
    return LabelledWindows(input_ids_NT, labels_NT)


def cross_entropy(model, batch):
    logits, labels = model(batch["input_ids"])[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()
    loss = functional.cross_entropy(logits, labels, ignore_index=NO_LABEL, reduction="sum")
    return {"loss": loss, "targets": (labels != NO_LABEL).sum()}


def trained(settings: FineTuning, folder: Path, *, dropout=0.0, objective=cross_entropy) -> Network:
    """A new network after `fit`."""
    model = network(dropout=dropout)
    fit(model, groups_of(model), labelled_windows(), objective, settings, folder)
    return model


def train_on_several(folder: Path, settings: FineTuning, dropout: float) -> None:
    """What each launched process does: train, and let each leave its parameters, in the parts that it has."""
    model = network(dropout=dropout)
    if torch.distributed.is_initialized() and torch.distributed.get_rank() == 1:
        # As where adapters are drawn at random: what counts is what the first process has.
        model.head.weight.data += 1
    fit(model, groups_of(model), labelled_windows(), cross_entropy, settings, folder)
    rank = torch.distributed.get_rank()
    local = {name: getattr(values, "_local_tensor", values) for name, values in model.state_dict().items()}
    torch.save(local, folder / f"rank_{rank}.pt")


def run_all(jobs) -> None:
    """Several jobs in one launch, as starting processes takes seconds."""
    for job in jobs:
        job()


def fails(error: Exception) -> None:
    raise error
