"""Run by an interpreter that has llama-cpp-python: python FILE MODEL.gguf TEXT OUT.npy. Token ids of the text file."""

import sys
from pathlib import Path

import llama_cpp
import numpy as np


def main() -> None:
    model, text, out = sys.argv[1:]
    engine = llama_cpp.Llama(model, vocab_only=True, verbose=False)
    np.save(out, np.array(engine.tokenize(Path(text).read_bytes(), add_bos=True)))


if __name__ == "__main__":
    main()
