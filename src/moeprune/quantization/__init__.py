"""Quantizers: the same model with most of its weights in fewer bits.

A quantizer is a frozen dataclass with ``__call__(model, windows, batch_size, workspace)``, which changes the model in
place and yields each decoder layer when it is final, so that one whose layers stay on disk is written layer by layer;
what lies outside the layers follows after the last one. ``windows`` are those of the calibration text where the class
variable ``needs_calibration`` is true, else None. ``replaced_layers`` does all that for schemes that look at the
weights alone. For predictions it says ``bits``, its ``label``, which ``parts`` of a model it takes, and the tensors
that it stores for a linear layer, ``stored(shape, dtype)``, and for an embedding, ``stored_table(shape)``. To add one:
write it in a file of this folder (or of your own package) and name it in a YAML file under ``conf/quantizer/``.
"""
