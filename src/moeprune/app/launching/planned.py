"""A job that is not run: whether its config is sound, what it would take, and which stages it would compute."""

from collections.abc import Iterator
from functools import cache
from typing import Any

from omegaconf import DictConfig, OmegaConf

from moeprune.app.build import build_experiment, build_optional
from moeprune.app.check import checked
from moeprune.app.footprint import Deployed, Unpruned, predicted_row
from moeprune.app.launching.compose import ComposedJob
from moeprune.evaluation.generated_code import require_permission
from moeprune.evaluation.task_checks import runs_code
from moeprune.evaluation.task_files import HarnessTask, find_task
from moeprune.evaluation.tasks import shipped_tasks
from moeprune.models.footprint.peak import TRAINED_BYTES, Activations, adapter_parameters
from moeprune.models.source import AUTO, LARGEST_SHARE_OF_MEMORY, NEVER
from moeprune.pipeline.experiment import Experiment
from moeprune.pipeline.identity import stage_key
from moeprune.pipeline.order import RECOVER
from moeprune.recovery.adapters import Adapters
from moeprune.recovery.weights import AllWeights
from moeprune.report.tables.dry_run import MARGIN_GIB, PlannedJob
from moeprune.report.tables.footprint import GIBIBYTE, GPUS, MEBIBYTE, FootprintRow

# A table of jobs says nothing of serving them.
JUST_WEIGHTS = Deployed(context=1, batch=1, margin_gib=0)
# What decides which checkpoint is read and how it computes; of the rest, `budget` and `pruned` know.
OF_THE_MODEL = ("path", "revision", "compute_dtype", "experts_per_token")

Stages = set[tuple[str, str]]


class Planner:
    """Plans jobs one by one; what they share is computed once."""

    def __init__(self) -> None:
        self._models: dict[str, Unpruned] = {}
        self._rows: dict[tuple[Any, ...], FootprintRow] = {}

    def plan(self, job: ComposedJob) -> tuple[PlannedJob, Stages]:
        """The job's row in the table, and (stage, key) of what it would compute.

        Raises InputError, BudgetError or ModelError for what is bound to fail and can be told without the checkpoint;
        what only its tokenizer, its tensors or the data can tell is not looked at.
        """
        config = checked(OmegaConf.masked_copy(job.config, [str(key) for key in job.config if key != "hydra"]))
        build_optional("tracking", config.tracking)
        experiment = build_experiment(config)
        dense = self._unpruned(config, experiment)
        experiment.check_on(dense.shape, getattr(dense.model.config, "max_position_embeddings", None))
        tasks = [choice.name for choice in experiment.evaluation.task_choices if choice.name not in shipped_tasks()]
        for task in tasks:
            if runs_code(_harness_task(task)):
                require_permission(task, experiment.evaluation.run_generated_code)
        row = self._row(dense, experiment, str(config.model))
        whole, streamed = _peaks(experiment, dense, row)
        if experiment.evaluation.speed is not None or any(_generates(task) for task in tasks):
            streamed = None
        share = LARGEST_SHARE_OF_MEMORY if experiment.model.streaming == AUTO else 1.0
        planned = PlannedJob(
            number=job.number,
            overrides=job.overrides,
            footprint=row,
            whole_bytes=whole,
            whole_gpu=_smallest_gpu(whole, dense.held_bytes / share),
            streamed_bytes=streamed,
            streamed_gpu=_smallest_gpu(streamed, 0),
        )
        return planned, set(_stages(config, experiment, dense))

    def _unpruned(self, config: DictConfig, experiment: Experiment) -> Unpruned:
        key = str(config.model)
        if key not in self._models:
            self._models[key] = Unpruned(experiment.model)
        return self._models[key]

    def _row(self, dense: Unpruned, experiment: Experiment, model: str) -> FootprintRow:
        keeps_all = getattr(experiment.allocator, "keeps_all_channels", False)
        ratio = 0.0 if keeps_all else experiment.ratio
        key = (model, ratio, experiment.quantizer)
        if key not in self._rows:
            self._rows[key] = predicted_row(dense, ratio, experiment.quantizer, JUST_WEIGHTS)
        return self._rows[key]


@cache
def _harness_task(name: str) -> HarnessTask:
    """Raises InputError where there is none of the name."""
    return find_task(name, shipped_tasks())


def _generates(task: str) -> bool:
    return any(config.get("output_type") == "generate_until" for config in _harness_task(task).leaves.values())


def _peaks(experiment: Experiment, dense: Unpruned, row: FootprintRow) -> tuple[int | None, int | None]:
    """Bytes at the peak with all weights in memory, and with a layer at a time; None where that cannot be."""
    calibrated = experiment.calibration.batch_size * experiment.calibration.sequence_length
    evaluated = _windows(experiment.evaluation.batch_size) * experiment.evaluation.sequence_length
    calibration, evaluation = (_activations(experiment, dense, tokens) for tokens in (calibrated, evaluated))
    working = max(calibration.layer, evaluation.layer + evaluation.logits)
    backward = any(getattr(wanted, "needs_whole_model", False) for wanted in experiment.passes)
    recovering = _recovery_bytes(experiment, dense, row)
    through_all = calibration.backward(checkpointing=False) if backward else 0
    whole = max(dense.held_bytes + max(working, through_all), recovering)
    outside = dense.held_bytes - dense.largest_layer * dense.shape.layers
    streamed = max(outside + dense.largest_layer + working, recovering)
    source = experiment.model
    return (
        whole if source.streaming in (AUTO, NEVER) else None,
        None if source.streaming == NEVER or backward else streamed,
    )


def _recovery_bytes(experiment: Experiment, dense: Unpruned, row: FootprintRow) -> int:
    """The pruned model, what trains, and a micro-batch; 0 without a recovery that is known here."""
    recovery: Any = experiment.recovery
    if recovery is None or not hasattr(recovery, "training"):
        return 0
    training, weights = recovery.training, recovery.weights
    tokens = training.micro_batch_size * recovery.data.sequence_length
    batch = _activations(experiment, dense, tokens).backward(training.gradient_checkpointing)
    pruned = row.total_parameters * experiment.model.computation_dtype.itemsize
    if isinstance(weights, AllWeights):
        return row.total_parameters * TRAINED_BYTES + batch
    trained = 0
    if isinstance(weights, Adapters):
        kept = round((1 - row.removed_ratio) * dense.shape.layers * dense.shape.experts * dense.shape.width)
        hidden = dense.model.config.hidden_size
        trained = adapter_parameters(dense.shape, hidden, kept, weights.rank, weights.use_dora)
    return pruned + trained * TRAINED_BYTES + batch


def _activations(experiment: Experiment, dense: Unpruned, tokens: int) -> Activations:
    return Activations(tokens, dense.shape, dense.model.config, experiment.model.computation_dtype.itemsize)


def _windows(batch_size: object) -> int:
    """One where the size is found while the job runs: such a search ends below what there is."""
    return batch_size if isinstance(batch_size, int) else 1


def _smallest_gpu(peak: int | None, free: float) -> str | None:
    """The smallest that holds the peak and a margin, and ``free`` bytes; None where there is none."""
    if peak is None:
        return None
    needed = max(peak, free) + MARGIN_GIB * GIBIBYTE
    return next((name for name, mebibytes in GPUS.items() if needed <= mebibytes * MEBIBYTE), None)


def _stages(config: DictConfig, experiment: Experiment, dense: Unpruned) -> Iterator[tuple[str, str]]:
    """(stage, key) of what the job computes, in order; equal keys mean equal results, as in the stage cache.

    The keys are made of the config, where the cache's are made of the checkpoint's and the data's content. Left out are
    the stages of a moment: scores, plan and the reports.
    """
    chosen: dict[str, Any] = OmegaConf.to_container(config, resolve=True)  # type: ignore[assignment]
    model = {key: chosen["model"].get(key) for key in OF_THE_MODEL}
    calibration = stage_key("calibration", 0, {"model": model, "calibration": chosen["calibration"]}, [])
    statistics = stage_key("statistics", 0, {"model": model}, [calibration])
    passes = [stage_key(wanted.stage, wanted.version, wanted, [statistics]) for wanted in experiment.passes]
    yield from [("calibration", calibration), ("statistics", statistics)]
    yield from ((f"pass/{wanted.stage}", key) for wanted, key in zip(experiment.passes, passes, strict=True))
    of_plan = {group: chosen[group] for group in ("scorer", "allocator", "surgery")}
    budget = experiment.budget_on(dense.shape)
    latest = stage_key("pruned", 0, {**of_plan, "budget": budget, "dtype": experiment.model.dtype}, [statistics])
    yield "pruned", latest
    models = {"dense": stage_key("dense", 0, model, []), "pruned": latest}
    for stage, plug_in in experiment.after_pruning:
        name, group = ("recovered", "recovery") if stage == RECOVER else ("quantized", "quantizer")
        calibrated = [calibration] if getattr(plug_in, "needs_calibration", False) else []
        latest = stage_key(name, 0, {name: chosen[group]}, [latest, *calibrated])
        yield name, latest
        models[name] = latest
    for key in models.values():
        yield "evaluation", stage_key("evaluation", 0, {"evaluation": chosen["evaluation"]}, [key])
