"""Quantizers: the same model with most of its weights in fewer bits.

A quantizer is a frozen dataclass with ``__call__(model, workspace)``, which changes the model in place and yields each
decoder layer when it is final, so that one whose layers stay on disk is written layer by layer; ``replaced_layers``
does that. For predictions it says ``bits``, its ``label``, and ``parts(shape, dtype)``, the tensors that it stores for
a weight. To add one: write it in a file of this folder (or of your own package) and name it in a YAML file under
``conf/quantizer/``.
"""
