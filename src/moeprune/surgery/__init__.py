"""The only place that cuts, merges or refits weights.

A surgery is a frozen dataclass with ``__call__(model, plan, statistics, windows, batch_size, workspace)``: it changes
the dense model in place to what the plan keeps, says what fills the gap, and yields each decoder layer when it is
final, so that a model that does not fit into memory is written layer by layer. To add one: write it in a file of this
folder (or of your own package), let it return `moeprune.surgery.prune.cut_layers`, and name it in a YAML file under
``conf/surgery/``.
"""
