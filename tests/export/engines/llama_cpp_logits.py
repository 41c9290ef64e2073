"""Run by an interpreter that has llama-cpp-python: python FILE MODEL.gguf TOKENS.npy OUT.npy. Logits [T, V]."""

import sys

import llama_cpp
import numpy as np


def main() -> None:
    model, tokens_file, out = sys.argv[1:]
    tokens = np.load(tokens_file).tolist()
    # A cache in float32: its usual 16 bits would hide differences below 1e-3.
    exact = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32}
    engine = llama_cpp.Llama(model, n_ctx=256, logits_all=True, verbose=False, n_threads=1, **exact)
    engine.eval(tokens)
    np.save(out, np.array(engine.scores[: len(tokens)]))


if __name__ == "__main__":
    main()
