"""Writes pruned checkpoints in formats that stock engines run: transformers, vLLM, llama.cpp."""
