"""The job of ``moeprune-export``."""

import shutil
from importlib.util import find_spec
from pathlib import Path

from omegaconf import DictConfig

from moeprune.app.terminal import quiet_libraries
from moeprune.errors import InputError, require_choice
from moeprune.export.checkpoint import open_checkpoint
from moeprune.export.shape import stock_shape
from moeprune.export.stock import StockModel, stock_model
from moeprune.export.transformers_files import write_transformers

FORMATS = ("transformers", "gguf")
GIBIBYTE = 2**30


def run_export(config: DictConfig) -> None:
    """Write the checkpoint that the config names; nothing appears under the name of ``out`` before it is complete."""
    require_choice("format", config.format, FORMATS)
    out = Path(config.out).expanduser()
    _check_out(out, config.format)
    quiet_libraries()
    checkpoint = open_checkpoint(Path(config.checkpoint).expanduser())
    stock = stock_model(checkpoint, stock_shape(checkpoint, pad=config.pad))
    partial = out.with_name(f".{out.name}.partial")
    _remove(partial)
    try:
        if config.format == "transformers":
            partial.mkdir(parents=True)
            write_transformers(stock, partial)
        else:
            _write_gguf(stock, partial, config)
        partial.rename(out)
    finally:
        _remove(partial)
    size = sum(file.stat().st_size for file in ([out] if out.is_file() else out.iterdir()))
    print(f"{out}: {stock.shape.experts} experts of width {stock.shape.width}, {size / GIBIBYTE:.3f} GiB.")


def _check_out(out: Path, file_format: str) -> None:
    if out.exists():
        raise InputError(f"{out} exists.", change="Give out a new name.")
    if (file_format == "gguf") != (out.suffix == ".gguf"):
        raise InputError(
            f"out={out} does not fit format={file_format}.",
            change="Give out a name that ends in .gguf for format=gguf, that of a new folder for format=transformers.",
        )


def _write_gguf(stock: StockModel, file: Path, config: DictConfig) -> None:
    if find_spec("gguf") is None:
        raise InputError("format=gguf needs the package gguf.", change="Install it: pip install 'moeprune[export]'.")
    from moeprune.export.gguf_files import ENCODINGS, write_gguf

    require_choice("encoding", config.encoding, ENCODINGS)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_gguf(stock, file, config.encoding, config.pre_tokenizer)


def _remove(path: Path) -> None:
    """What an export that was interrupted left."""
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
