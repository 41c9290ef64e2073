"""Models in which whole experts are the right thing to take, by construction: embedded ones with every expert twice.

They are there so that the comparison of channels with whole experts can come out the other way. They are made of an
embedded model when they are first asked for.
"""

import hashlib
import json
import os
import re
import shutil
import struct
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from uuid import uuid4

from moeprune.errors import InputError
from moeprune.models.headers import read_header, read_json

WEIGHTS, CONFIG = "model.safetensors", "config.json"
# A model card would say what is not true of the copy.
COPIED = ("generation_config.json", "tokenizer.json", "tokenizer_config.json")
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")
EXPERTS_PER_TOKEN = "num_experts_per_tok"
_EXPERT = re.compile(r"(?P<experts>.*\.experts\.)(?P<index>\d+)(?P<part>\..*)")
_ROUTER = re.compile(r".*\.mlp\.gate\.weight")
VERSION = 1


@dataclass(frozen=True)
class Planting:
    """How expert E + e, a copy of expert e of E, is reached.

    Its router row is that of e divided by ``2 ** halvings``; a token is sent to ``per_token`` times as many experts.
    """

    halvings: int
    per_token: int


# By the end of the model's name. A token's K best experts become K pairs. With a softmax over all experts each copy has
# half the probability, so sum over both of (p_te / 2) f_te = p_te f_te, and a gate that is renormalised over the chosen
# ones is halved as well: the function is the same, and merging the pairs gives back the experts that there were.
# Spares have a quarter of the logit, so they are chosen for few tokens, instead of a better expert; where all of them
# are dropped, the model is the one that they were planted in.
PLANTINGS = {"_pairs": Planting(halvings=0, per_token=2), "_spares": Planting(halvings=2, per_token=1)}


def planted_names(dense: str) -> list[str]:
    """The names of the models that can be made of an embedded one."""
    return [dense + suffix for suffix in PLANTINGS]


def planted_folder(dense: Path, name: str) -> Path:
    """The folder of one of `planted_names`, made of the model in ``dense``; below ``$XDG_CACHE_HOME`` or ``~/.cache``.

    Raises InputError where it cannot be written.
    """
    caches = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    folder = caches / "moeprune" / f"{name}-{_digest(dense)}"
    if folder.is_dir():
        return folder
    partial = folder.with_name(f".{folder.name}.{uuid4().hex}.partial")
    try:
        partial.mkdir(parents=True)
        plant(dense, PLANTINGS[name.removeprefix(dense.name)], partial)
        partial.rename(folder)
    except OSError as error:
        if not folder.is_dir():  # else another process was faster
            raise InputError(
                f"embedded:{name} is made when it is first used, and {folder} cannot be written: {error.strerror}.",
                change="Set XDG_CACHE_HOME to a folder of your own with 20 MB free.",
            ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def plant(dense: Path, planting: Planting, folder: Path) -> None:
    """Write into ``folder`` the model in ``dense`` with each of its routed experts twice."""
    config = read_json(dense / CONFIG)
    changed = {name: 2 * config[name] for name in EXPERT_COUNTS if name in config}
    changed[EXPERTS_PER_TOKEN] = planting.per_token * config[EXPERTS_PER_TOKEN]
    (folder / CONFIG).write_text(json.dumps(config | changed, indent=2))
    stored = (dense / WEIGHTS).read_bytes()
    data = stored[8 + struct.unpack("<Q", stored[:8])[0] :]
    tensors = sorted(_tensors(read_header(dense / WEIGHTS), data, planting), key=lambda tensor: tensor.name)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        start, end = end, end + len(tensor.data)
        header[tensor.name] = {"dtype": "BF16", "shape": tensor.shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # as the library aligns what follows
    with (folder / WEIGHTS).open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.writelines(tensor.data for tensor in tensors)
    for name in COPIED:
        shutil.copyfile(dense / name, folder / name)


@dataclass(frozen=True)
class _Tensor:
    """One in bfloat16, as it lies in the file."""

    name: str
    shape: tuple[int, ...]
    data: bytes


def _tensors(header: dict[str, dict], data: bytes, planting: Planting) -> Iterator[_Tensor]:
    found = [match for name in header if (match := _EXPERT.fullmatch(name))]
    experts = 1 + max(int(match["index"]) for match in found)
    for name, entry in header.items():
        shape, (begin, end) = tuple(entry["shape"]), entry["data_offsets"]
        if _ROUTER.fullmatch(name):
            rows = data[begin:end]
            yield _Tensor(name, (2 * shape[0], *shape[1:]), rows + _halved(rows, planting.halvings))
            continue
        yield _Tensor(name, shape, data[begin:end])
        if match := _EXPERT.fullmatch(name):
            copy = f"{match['experts']}{experts + int(match['index'])}{match['part']}"
            yield _Tensor(copy, shape, data[begin:end])


def _halved(values: bytes, halvings: int) -> bytes:
    """Numbers in bfloat16 (a sign, 8 bits of exponent, 7 of mantissa) divided by ``2 ** halvings``, exactly."""
    bits = array("H", values)
    for place, value in enumerate(bits):
        exponent = value >> 7 & 0xFF
        bits[place] = value - (halvings << 7) if exponent > halvings else value & 0x8000  # too small: zero
    return bits.tobytes()


@cache
def _digest(dense: Path) -> str:
    """Of what a planted model is made of, and how."""
    digest = hashlib.sha256(f"{VERSION} {PLANTINGS}".encode())
    for name in (CONFIG, WEIGHTS, *COPIED):
        digest.update((dense / name).read_bytes())
    return digest.hexdigest()[:16]
