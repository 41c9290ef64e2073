"""Scorers: pure functions from statistics to scores.

A scorer is a frozen dataclass with ``__call__(statistics: Statistics) -> Scores``. To add one: write it in a file of
this folder (or of your own package) and name it in a YAML file under ``conf/scorer/``.

    channels, from routed tokens         attribution, removal, activation, wanda, camera, flap
    channels, from weights or chance     magnitude, random_scores
    channels, with a pass of their own   gradient, released_attribution
    whole experts                        frequency (three ways to count), expert_outputs (EAN, REAP, MAN, ...), aimer
    whole experts, chosen together       subsets, c_prune
    experts to merge                     merging
    shared                               per_token (means), weights (what allocators weigh experts by)
"""
