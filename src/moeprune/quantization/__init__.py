"""Quantizers: from a model in memory to the same model with some weights in fewer bits.

A quantizer is a frozen dataclass with ``__call__(model) -> model``. To add one: write it in a file of this folder (or
of your own package) and name it in a YAML file under ``conf/quantizer/``.
"""
