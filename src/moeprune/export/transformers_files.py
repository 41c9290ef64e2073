"""Writes a checkpoint of the family's own format: the files that stock transformers and vLLM read."""

import json
import shutil
from pathlib import Path

from safetensors.torch import save_file
from transformers.core_model_loading import revert_weight_conversion

from moeprune.export.stock import StockModel
from moeprune.models.compressed.files import CONFIG, INDEX

# What describes the pruned checkpoint itself; everything else there belongs to the tokenizer or to generation.
OWN_FILES = ("*.safetensors", "*.py", INDEX, CONFIG, "README.md")


def write_transformers(stock: StockModel, folder: Path) -> None:
    """Config, weights under the names of the family's published checkpoints, tokenizer; into an empty folder.

    One file per decoder layer and one for the rest; at most about three layers' bytes are held at a time.
    """
    files: dict[str, str] = {}
    count = 1 + stock.config.num_hidden_layers
    total_bytes = 0
    for number, part in enumerate(stock.weights(stock.checkpoint.read), start=1):
        file = f"model-{number:05}-of-{count:05}.safetensors"
        # Splitting fused experts gives views of one tensor; a file wants each on its own.
        published = revert_weight_conversion(stock.model, stock.in_family_layout(part))
        tensors = {name: tensor.clone() for name, tensor in published.items()}
        save_file(tensors, folder / file, {"format": "pt"})
        files |= dict.fromkeys(tensors, file)
        total_bytes += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(files.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    stock.config.save_pretrained(folder)
    source = stock.checkpoint.folder
    own = {path for pattern in OWN_FILES for path in source.glob(pattern)}
    for path in source.iterdir():
        if path.is_file() and path not in own:
            shutil.copyfile(path, folder / path.name)
