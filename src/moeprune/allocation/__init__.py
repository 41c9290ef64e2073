"""Allocators: pure functions from scores and a budget to a plan.

An allocator is a frozen dataclass with ``__call__(scores: Scores, budget: Budget) -> Plan``. It may have
``check(budget)``, which raises BudgetError for what it cannot do, before a model is loaded, and
``channels_at_once(shape)``, where its plans do not remove single blocks. To add one: write it in a file of this folder
(or of your own package) and name it in a YAML file under ``conf/allocator/``.
"""
