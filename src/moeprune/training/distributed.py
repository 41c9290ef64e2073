"""Processes, devices and precision: one process per device, and how the model is spread over them."""

import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Thread
from typing import Any

import torch
from lightning.fabric import Fabric
from lightning.fabric.plugins import MixedPrecision, Precision
from lightning.fabric.plugins.environments import LightningEnvironment, TorchElasticEnvironment
from lightning.fabric.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from torch import Tensor, distributed, nn
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.fsdp import fully_shard
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from moeprune import errors
from moeprune.errors import InputError, MoepruneError
from moeprune.models.adapter import decoder_layers


def launch(function: Callable[..., None], arguments: Sequence[Any], devices: int) -> None:
    """Call a picklable ``function(*arguments)`` in ``devices`` new processes at once; for one device, in this process.

    The processes find each other by the variables that torchrun sets, and ``cuda`` is each one's own device. They end
    with this process. What they return is lost: let the first leave a file.

    Raises InputError when there are fewer devices, and the MoepruneError that any process raises.
    """
    if devices == 1:
        function(*arguments)
        return
    if torch.cuda.is_available() and torch.cuda.device_count() < devices:
        raise InputError(f"devices={devices} is more than there are.", change=f"Use {torch.cuda.device_count()}.")
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=devices,
        run_id="moeprune",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",  # any free port
        local_addr="localhost",
        start_method="spawn",
        max_restarts=0,
    )
    with TemporaryDirectory() as folder:
        message, threads = Path(folder) / "error.json", max(1, torch.get_num_threads() // devices)
        try:
            with _tracebacks_logged_unless(message):
                elastic_launch(config, _call)(function, tuple(arguments), message, threads, os.getpid())
        except ChildFailedError:
            if message.exists():
                raise _error_of(message) from None
            raise


@contextmanager
def _tracebacks_logged_unless(message: Path) -> Iterator[None]:
    """Within the context torch does not log the traceback of an error that has left its message there."""

    def is_untold(_record: logging.LogRecord) -> bool:
        return not message.exists()

    torch_log = logging.getLogger("torch.distributed.elastic.multiprocessing.api")
    torch_log.addFilter(is_untold)
    try:
        yield
    finally:
        torch_log.removeFilter(is_untold)


def _call(function: Callable[..., None], arguments: Sequence[Any], message: Path, threads: int, parent: int) -> None:
    """What each new process does."""
    Thread(target=_end_with, args=[parent], daemon=True).start()
    torch.set_num_threads(threads)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    try:
        function(*arguments)
    except MoepruneError as error:
        own = message.with_suffix(f".{os.environ['RANK']}")
        own.write_text(json.dumps({"kind": type(error).__name__, "message": str(error)}))
        own.replace(message)
        raise
    if distributed.is_initialized():
        distributed.destroy_process_group()


def _end_with(parent: int) -> None:
    """End this process when the one that started it is killed: nobody would see to it any more."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _error_of(message: Path) -> MoepruneError:
    said = json.loads(message.read_text())
    return getattr(errors, said["kind"])(said["message"])


def fabric_for(device: torch.device, *, devices: int = 1, strategy: str = "auto", precision: str = "32-true") -> Fabric:
    """Lightning's view of the devices; several want the processes of `launch`, one is ``device`` itself.

    A SLURM job's variables are not read: its tasks are none of ours, and its signals stay with who started the job.
    ``32-true`` and ``bf16-true`` compute in the types that the weights have. Strategies: ``ddp`` (``auto``), and
    ``fsdp``, which also shards the weights that do not train.

    Raises InputError for ``16-mixed`` with ``fsdp``.
    """
    if (precision, strategy) == ("16-mixed", "fsdp"):
        raise InputError("precision=16-mixed does not work with strategy=fsdp.", change="Use precision=bf16-mixed.")
    plugin: Precision = Precision()
    if precision.endswith("-mixed"):
        plugin = MixedPrecision(precision, device.type)  # type: ignore[arg-type]
    if devices == 1:
        single = SingleDeviceStrategy(device)
        return Fabric(accelerator=device.type, strategy=single, plugins=[plugin, LightningEnvironment()])
    spread = ModelParallelStrategy(_shard, devices, 1) if strategy == "fsdp" else _data_parallel()
    fabric = Fabric(
        accelerator=device.type, devices=devices, strategy=spread, plugins=[plugin, TorchElasticEnvironment()]
    )
    fabric.launch()
    return fabric


def _data_parallel() -> DDPStrategy:
    """Experts without a token on one device have no gradient there; frozen weights and buffers need no sending."""
    return DDPStrategy(find_unused_parameters=True, init_sync=False, forward_sync_buffers=False)


def _shard(model: nn.Module, mesh: Any) -> Any:
    """FSDP, one decoder layer at a time. Raises InputError for weights that it cannot shard."""
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point():
            raise InputError(f"strategy=fsdp cannot shard the quantised {name}.", change="Use strategy=ddp.")
    for _, layer in decoder_layers(model):
        fully_shard(layer, mesh=mesh["data_parallel"])
        # Before the hook of FSDP's own that gives the whole weights back.
        layer.register_forward_hook(_touch_all_that_trains, prepend=True)
    return fully_shard(model, mesh=mesh["data_parallel"])


def _touch_all_that_trains(layer: nn.Module, _inputs: Any, output: Any) -> Any:
    """The output plus 0, with a gradient (of 0) for every parameter: devices must send the same ones at the same time,
    whatever experts their tokens went to."""
    zero = sum(parameter.flatten()[:1].sum() for parameter in layer.parameters() if parameter.requires_grad) * 0
    if isinstance(output, Tensor):
        return output + zero
    return (output[0] + zero, *output[1:])


def broadcast_from_first(parameters: Sequence[Tensor], fabric: Fabric) -> None:
    """Give all processes the values that the first one has."""
    if fabric.world_size == 1:
        return
    for parameter in parameters:
        values = parameter.detach().to(fabric.device)
        distributed.broadcast(values, src=0)
        parameter.detach().copy_(values)
