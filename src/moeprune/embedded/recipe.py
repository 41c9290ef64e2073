"""The recipe that trained the embedded models: text -> tokenizer -> token windows -> Lightning loop -> checkpoint."""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from moeprune.embedded.corpus import training_text
from moeprune.embedded.tokenizer import train_tokenizer
from moeprune.training.data import WindowMixture
from moeprune.training.loop import TrainingSettings, train

log = logging.getLogger(__name__)


def train_embedded_model(
    architecture: Callable[[], PreTrainedConfig],
    domain_weights: Mapping[str, float],
    settings: TrainingSettings,
    run_dir: Path,
) -> Path:
    """Train one embedded model and write it, in bf16 with its tokenizer, to ``run_dir/NAME``; returns that folder.

    A run that was interrupted goes on from its last checkpoint when it is started again with the same ``run_dir``.
    """
    config = architecture()
    texts = {domain: training_text(domain) for domain in domain_weights}
    tokenizer = train_tokenizer(texts.values(), config.vocab_size)
    tokens_of = {domain: token_ids(tokenizer, text) for domain, text in texts.items()}
    log.info("training tokens: %s", {domain: len(ids) for domain, ids in tokens_of.items()})
    windows = WindowMixture(
        tokens_of,
        domain_weights,
        count=settings.steps * settings.batch_size,
        sequence_length=settings.sequence_length,
        begin_token=tokenizer.bos_token_id,
        seed=settings.seed,
    )
    model = untrained_model(config, settings.seed)
    train(model, windows, settings, run_dir)
    folder = run_dir / architecture.__name__
    model.to(torch.bfloat16).save_pretrained(folder)  # type: ignore[arg-type]
    tokenizer.save_pretrained(folder)
    return folder


def untrained_model(config: PreTrainedConfig, seed: int) -> PreTrainedModel:
    """The model with random weights in fp32, as training starts from it."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.set_experts_implementation("grouped_mm")
    return model


def token_ids(tokenizer: PreTrainedTokenizerFast, text: str) -> np.ndarray:
    """All tokens of a text, int32, without special tokens."""
    # Encoded in pieces: one call on megabytes of text is far slower than a batch of lines.
    lines = text.splitlines(keepends=True)
    pieces = ["".join(lines[start : start + 200]) for start in range(0, len(lines), 200)]
    encoded = tokenizer.backend_tokenizer.encode_batch(pieces, add_special_tokens=False)
    return np.concatenate([np.asarray(piece.ids, dtype=np.int32) for piece in encoded])
