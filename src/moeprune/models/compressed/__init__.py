"""Checkpoints of pruned and quantised models: what lies where, written and read layer by layer."""
