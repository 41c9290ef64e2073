"""Throughput: how many tokens a model reads and writes in a second, on this machine."""

import platform
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from moeprune.errors import InputError, require_positive
from moeprune.evaluation.fitting import try_out

Loader = Callable[[], PreTrainedModel]

SEED = 0


@dataclass(frozen=True)
class Speed:
    """What is timed: ``batch_size`` random prompts of ``prompt_tokens`` tokens are read (prefill), then ``new_tokens``
    tokens are written to each, greedily and with a cache of keys and values (decode). ``repeats`` times, after once to
    warm up; medians are reported.
    """

    batch_size: int = 8
    prompt_tokens: int = 512
    new_tokens: int = 64
    repeats: int = 5

    def __post_init__(self) -> None:
        require_positive(self, "batch_size", "prompt_tokens", "new_tokens", "repeats")

    def __call__(self, models: Mapping[str, PreTrainedModel]) -> dict[str, dict[str, Any]]:
        """``{name: {"prefill_tokens_per_second", "decode_tokens_per_second", ...}}``, with the settings and the device.

        The models take turns, so that a machine that grows slower or faster meanwhile favours none of them. Raises
        InputError where the prompts do not fit in memory.
        """
        seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
        for repeat in tqdm(range(self.repeats + 1), desc="speed", unit="repeat"):
            for name, model in models.items():
                took = try_out(lambda model=model: _seconds(model, self._prompts(model), self.new_tokens))  # type: ignore[misc]
                if took is None:
                    raise InputError(
                        f"{self.batch_size} prompts of {self.prompt_tokens} tokens do not fit in GPU memory.",
                        change="Use a smaller evaluation.speed.batch_size, prompt_tokens or new_tokens.",
                    )
                if repeat > 0:
                    seconds[name].append(took)
        return {name: self._told(models[name], took) for name, took in seconds.items()}

    def _prompts(self, model: PreTrainedModel) -> Tensor:
        generator = torch.Generator().manual_seed(SEED)
        vocabulary = model.config.get_text_config().vocab_size
        return torch.randint(vocabulary, (self.batch_size, self.prompt_tokens), generator=generator).to(model.device)

    def _told(self, model: PreTrainedModel, seconds: list[tuple[float, float]]) -> dict[str, Any]:
        prefill, decode = (median(column) for column in zip(*seconds, strict=True))
        return {
            "prefill_tokens_per_second": self.batch_size * self.prompt_tokens / prefill,
            "decode_tokens_per_second": self.batch_size * self.new_tokens / decode,
            **vars(self),
            "device": device_name(model.device),
        }


def device_name(device: torch.device) -> str:
    """A GPU by its name, a CPU by that which Linux knows, else by its kind, and with the threads that compute."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    told = re.search(r"^model name\s*: (.+)$", _cpu_description(), re.MULTILINE)
    name = told[1].strip() if told else f"{platform.machine()} CPU"
    return f"{name}, threads: {torch.get_num_threads()}"


def _cpu_description() -> str:
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        return ""


@torch.inference_mode()
def _seconds(model: PreTrainedModel, prompts_BT: Tensor, new_tokens: int) -> tuple[float, float]:
    """Seconds to read the prompts, which gives the first new token, and to write ``new_tokens`` more."""
    start = _now(prompts_BT.device)
    output: Any = model(prompts_BT, use_cache=True, logits_to_keep=1)
    read = _now(prompts_BT.device)
    for _ in range(new_tokens):
        next_B1 = output.logits[:, -1:].argmax(dim=-1)
        output = model(next_B1, past_key_values=output.past_key_values, use_cache=True)
    return read - start, _now(prompts_BT.device) - read


def _now(device: torch.device) -> float:
    """The clock, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def measure(speed: Speed, loaders: Mapping[str, Loader], together: bool) -> dict[str, dict[str, Any]]:
    """``{name: {"speed": ...}}`` of the models that ``loaders`` give; ``interleaved`` says whether they took turns.

    Where the models do not fit ``together`` in memory, one is timed after the other.
    """
    if together:
        found = speed({name: load() for name, load in loaders.items()})
    else:
        found = {name: speed({name: load()})[name] for name, load in loaders.items()}
    return {name: {"speed": {**told, "interleaved": together}} for name, told in found.items()}
