"""Recovery: a compressed model is trained a little further.

`recover.Recovery` puts together what trains (`adapters`, `weights`), for what (`objectives`), and on what
(`instructions`, `texts`); the loop is `moeprune.training`. A part of your own is a frozen dataclass with the same
methods, named by ``_target_`` in a YAML file under ``conf/recovery/``.
"""
