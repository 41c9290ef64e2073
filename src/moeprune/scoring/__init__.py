"""Scorers: pure functions from statistics to scores.

A scorer is a frozen dataclass with ``__call__(statistics: Statistics) -> Scores``. To add one: write it in a file of
this folder (or of your own package) and name it in a YAML file under ``conf/scorer/``.
"""
