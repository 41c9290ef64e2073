"""Structural compression of Mixture-of-Experts language models."""
