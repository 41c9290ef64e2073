"""The only place that cuts, merges or refits weights.

A surgery is a frozen dataclass with ``__call__(model, plan, statistics, windows, batch_size) -> model``: it changes the
dense model in place to what the plan keeps, and says what fills the gap. To add one: write it in a file of this folder
(or of your own package), end it with `moeprune.surgery.prune.prune`, and name it in a YAML file under
``conf/surgery/``.
"""
