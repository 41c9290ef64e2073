"""Run by an interpreter that has vLLM: python FILE MODEL TOKENS.npy OUT.npy. Log probabilities [T - 1, V]."""

import os
import sys

os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_KVCACHE_SPACE="1", HF_HUB_OFFLINE="1")

import numpy as np
from vllm import LLM, SamplingParams


def main() -> None:
    model, tokens_file, out = sys.argv[1:]
    tokens = np.load(tokens_file).tolist()
    engine = LLM(model, dtype="float32", enforce_eager=True, max_model_len=256, max_num_seqs=1, max_logprobs=-1)
    (result,) = engine.generate({"prompt_token_ids": tokens}, SamplingParams(max_tokens=1, prompt_logprobs=-1))
    rows = [[row[token].logprob for token in range(len(row))] for row in result.prompt_logprobs[1:]]
    np.save(out, np.array(rows))


if __name__ == "__main__":
    main()
