"""The job of ``moeprune-train``."""

from pathlib import Path

import torch
from hydra.utils import get_method, instantiate
from omegaconf import DictConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from moeprune.app.terminal import quiet_libraries
from moeprune.embedded import architectures
from moeprune.embedded.card import write_model_card
from moeprune.embedded.recipe import train_embedded_model
from moeprune.errors import InputError
from moeprune.evaluation.tasks import shipped_tasks, task_accuracies

ARCHITECTURES = ("tiny_qwen3_moe", "tiny_deepseek_v2")
EVALUATION_BATCH = 32


def run_training(config: DictConfig) -> None:
    """Train the architecture that the config names, and write its model card."""
    if config.architecture not in ARCHITECTURES:
        raise InputError(
            f"architecture={config.architecture} does not exist.", possible=ARCHITECTURES, given=config.architecture
        )
    quiet_libraries()
    torch.set_num_threads(config.threads)
    run_dir, weights, settings = Path(config.run_dir), dict(config.domain_weights), instantiate(config.settings)
    architecture = get_method(f"{architectures.__name__}.{config.architecture}")
    folder = train_embedded_model(architecture, weights, settings, run_dir)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    scores = task_accuracies(model, AutoTokenizer.from_pretrained(folder), shipped_tasks(), None, EVALUATION_BATCH)
    accuracies = {task: score["accuracy"] for task, score in scores.items()}
    card = write_model_card(folder, run_dir, weights, settings, accuracies)
    print(f"The trained model is in {folder}, its card in {card}.")
