"""The Hydra door: commands, config checks, tracking, provenance. Nothing below this room imports hydra or omegaconf."""
