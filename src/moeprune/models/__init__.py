"""The only place that knows architectures: finding MoE layers, ragged experts, checkpoints."""
