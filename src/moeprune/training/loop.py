"""Language-model training with Lightning: warm-up, constant rate, linear decay; resumes exactly from its checkpoint."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, TQDMProgressBar
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from moeprune.errors import NumericalError
from moeprune.models.adapter import recorded_routing
from moeprune.training.balance import load_balancing_loss
from moeprune.training.data import ResumedOrder


@dataclass(frozen=True)
class TrainingSettings:
    """Optimisation settings; every length is in optimizer steps, every window in tokens."""

    steps: int
    batch_size: int
    sequence_length: int
    learning_rate: float
    warmup_steps: int
    decay_fraction: float
    weight_decay: float
    gradient_clip: float
    balance_weight: float
    seed: int
    checkpoint_every: int = 100
    log_every: int = 20


class LanguageModelTraining(lightning.LightningModule):
    """Next-token cross-entropy plus ``balance_weight`` times the per-layer load-balancing loss."""

    def __init__(self, model: nn.Module, windows: Dataset[Tensor], settings: TrainingSettings) -> None:
        super().__init__()
        self.model = model
        self._windows = windows
        self._settings = settings

    def train_dataloader(self) -> DataLoader[Tensor]:
        # Called after a checkpoint is restored, so global_step says where the data order goes on.
        first = self.trainer.global_step * self._settings.batch_size
        order = ResumedOrder(len(self._windows), first)  # type: ignore[arg-type]
        return DataLoader(self._windows, batch_size=self._settings.batch_size, sampler=order, num_workers=0)

    def training_step(self, input_ids_BT: Tensor, _batch_index: int) -> Tensor:
        with recorded_routing(self.model) as routing:
            loss = self.model(input_ids=input_ids_BT, labels=input_ids_BT, use_cache=False).loss
        if not torch.isfinite(loss):
            raise NumericalError(f"The loss is {loss.item()} at step {self.global_step}; lower the learning rate.")
        balance = load_balancing_loss(routing)
        self.log_dict({"loss": loss, "balance": balance}, prog_bar=True)
        return loss + self._settings.balance_weight * balance

    def configure_optimizers(self) -> Any:
        settings = self._settings
        decayed = [p for p in self.model.parameters() if p.requires_grad and p.dim() >= 2]
        others = [p for p in self.model.parameters() if p.requires_grad and p.dim() < 2]
        groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.95), fused=True)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_factor(step, settings))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def rate_factor(step: int, settings: TrainingSettings) -> float:
    """Learning rate relative to its peak: linear warm-up, constant, linear decay to 0 over the last fraction."""
    warm = min(1.0, (step + 1) / max(1, settings.warmup_steps))
    decay_steps = max(1, math.ceil(settings.steps * settings.decay_fraction))
    return min(warm, max(0.0, (settings.steps - step) / decay_steps))


class LossCurve(lightning.Callback):
    """Appends ``{"step", "loss", "balance"}``, means over ``log_every`` steps; a resumed run rewrites its tail."""

    def __init__(self, path: Path, log_every: int) -> None:
        self._path, self._log_every = path, log_every
        self._window: list[tuple[float, float]] = []

    def state_dict(self) -> dict[str, Any]:
        """What checkpoints keep: the steps since the last line, for the mean of the next one."""
        return {"window": list(self._window)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._window = list(state_dict["window"])

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        kept = [line for line in self._lines() if json.loads(line)["step"] <= trainer.global_step]
        self._path.write_text("".join(f"{line}\n" for line in kept))

    def on_train_batch_end(self, trainer: lightning.Trainer, *_args: Any, **_kwargs: Any) -> None:
        metrics = trainer.callback_metrics
        self._window.append((float(metrics["loss"]), float(metrics["balance"])))
        if trainer.global_step % self._log_every == 0:
            loss, balance = (sum(values) / len(self._window) for values in zip(*self._window, strict=True))
            with self._path.open("a") as curve:
                curve.write(json.dumps({"step": trainer.global_step, "loss": loss, "balance": balance}) + "\n")
            self._window.clear()

    def _lines(self) -> list[str]:
        return self._path.read_text().splitlines() if self._path.exists() else []


def train(model: nn.Module, windows: Dataset[Tensor], settings: TrainingSettings, run_dir: Path) -> nn.Module:
    """Train in place until ``settings.steps``; goes on from ``run_dir/checkpoints/last.ckpt`` where that exists.

    Raises NumericalError when the loss is not finite; the last checkpoint then stays.
    """
    lightning.seed_everything(settings.seed, verbose=False)
    run_dir.mkdir(parents=True, exist_ok=True)
    checkpoints = ModelCheckpoint(
        run_dir / "checkpoints", filename="last", every_n_train_steps=settings.checkpoint_every, save_top_k=1,
        enable_version_counter=False,
    )  # fmt: skip
    trainer = lightning.Trainer(
        accelerator="auto",
        devices=1,
        max_steps=settings.steps,
        gradient_clip_val=settings.gradient_clip,
        callbacks=[checkpoints, LossCurve(run_dir / "loss_curve.jsonl", settings.log_every), TQDMProgressBar(20)],
        logger=False,
        enable_model_summary=False,
        default_root_dir=run_dir,
    )
    last = run_dir / "checkpoints" / "last.ckpt"
    loop = LanguageModelTraining(model, windows, settings)
    trainer.fit(loop, ckpt_path=last if last.exists() else None, weights_only=True)
    return model
