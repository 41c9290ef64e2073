"""Processes, devices and precision: one process per device, and how the model is spread over them."""

import os
import pickle
import socket
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import fully_shard

from moeprune.errors import InputError
from moeprune.models.adapter import decoder_layers
from moeprune.training.processes import Order
from moeprune.training.tasks import current_crew, require_as_many_tasks, work_together

if TYPE_CHECKING:
    from lightning.fabric import Fabric


def launch(function: Callable[..., None], arguments: Sequence[Any], devices: int) -> None:
    """Call a picklable ``function(*arguments)`` in ``devices`` new processes at once; for one device, in this process.

    They are all here, or, in a job of several tasks (`lead`), one in each task. They find each other by the variables
    that torchrun sets, and ``cuda`` is each one's own device. They end with this process. What they return is lost: let
    the first leave a file.

    Raises InputError when there are fewer devices, or more or fewer tasks; the MoepruneError that any process raises;
    LostProcessError when one is killed.
    """
    if devices == 1:
        function(*arguments)
        return
    crew = current_crew()
    require_as_many_tasks(devices)
    on_gpu = torch.cuda.is_available()
    if on_gpu and crew is None and torch.cuda.device_count() < devices:
        raise InputError(f"devices={devices} is more than there are.", change=f"Use {torch.cuda.device_count()}.")
    threads = torch.get_num_threads() if crew else max(1, torch.get_num_threads() // devices)
    meeting = distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)  # any free port
    call = pickle.dumps((_call, (function, tuple(arguments), threads, on_gpu)))
    work_together(Order(call, devices, meeting.port))


def _call(function: Callable[..., None], arguments: Sequence[Any], threads: int, on_gpu: bool) -> None:
    """What each new process does. Raises InputError where the first task has a GPU and this one has none."""
    torch.set_num_threads(threads)
    if on_gpu and not torch.cuda.is_available():
        raise InputError(
            f"Process {os.environ['RANK']} of {os.environ['WORLD_SIZE']} on {socket.gethostname()} sees no GPU.",
            change="Ask for as many GPUs as tasks on each node (gpus_per_node, tasks_per_node).",
        )
    function(*arguments)
    if distributed.is_initialized():
        distributed.destroy_process_group()


def fabric_for(
    device: torch.device, *, devices: int = 1, strategy: str = "auto", precision: str = "32-true"
) -> "Fabric":
    """Lightning's view of the devices; several want the processes of `launch`, one is ``device`` itself.

    A SLURM job's variables are not read: `launch` has said what counts, and signals stay with who started the job.
    ``32-true`` and ``bf16-true`` compute in the types that the weights have. Strategies: ``ddp`` (``auto``), and
    ``fsdp``, which also shards the weights that do not train.

    Raises InputError for ``16-mixed`` with ``fsdp``.
    """
    if (precision, strategy) == ("16-mixed", "fsdp"):
        raise InputError("precision=16-mixed does not work with strategy=fsdp.", change="Use precision=bf16-mixed.")
    # Imported here: it takes a second or two, which runs that train nothing should not wait for.
    from lightning.fabric import Fabric
    from lightning.fabric.plugins import MixedPrecision, Precision
    from lightning.fabric.plugins.environments import LightningEnvironment, TorchElasticEnvironment
    from lightning.fabric.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy

    plugin: Precision = Precision()
    if precision.endswith("-mixed"):
        plugin = MixedPrecision(precision, device.type)  # type: ignore[arg-type]
    if devices == 1:
        single = SingleDeviceStrategy(device)
        return Fabric(accelerator=device.type, strategy=single, plugins=[plugin, LightningEnvironment()])
    # Experts without a token on one device have no gradient there; frozen weights and buffers need no sending.
    ddp = DDPStrategy(find_unused_parameters=True, init_sync=False, forward_sync_buffers=False)
    spread = ModelParallelStrategy(_shard, devices, 1) if strategy == "fsdp" else ddp
    # Each process is a host of one device, as what it sees.
    environment = TorchElasticEnvironment()
    fabric = Fabric(
        accelerator=device.type, devices=1, num_nodes=devices, strategy=spread, plugins=[plugin, environment]
    )
    fabric.launch()
    return fabric


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


def broadcast_from_first(parameters: Sequence[Tensor], fabric: "Fabric") -> None:
    """Give all processes the values that the first one has."""
    if fabric.world_size == 1:
        return
    for parameter in parameters:
        values = parameter.detach().to(fabric.device)
        distributed.broadcast(values, src=0)
        parameter.detach().copy_(values)
