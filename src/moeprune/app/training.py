"""The job of ``moeprune-train``."""

from pathlib import Path

import torch
from hydra.utils import get_method, instantiate
from omegaconf import DictConfig

from moeprune.embedded import architectures
from moeprune.embedded.recipe import train_embedded_model
from moeprune.errors import InputError

ARCHITECTURES = ("tiny_qwen3_moe", "tiny_deepseek_v2")


def run_training(config: DictConfig) -> None:
    """Train the architecture that the config names, and write its model card."""
    if config.architecture not in ARCHITECTURES:
        raise InputError(
            f"architecture={config.architecture} does not exist.", possible=ARCHITECTURES, given=config.architecture
        )
    torch.set_num_threads(config.threads)
    folder = train_embedded_model(
        get_method(f"{architectures.__name__}.{config.architecture}"),
        dict(config.domain_weights),
        instantiate(config.settings),
        Path(config.run_dir),
    )
    print(f"The trained model is in {folder}.")
