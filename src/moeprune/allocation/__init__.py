"""Allocators: pure functions from scores and a budget to a plan.

An allocator is a frozen dataclass with ``__call__(scores: Scores, budget: Budget) -> Plan``. It may have
``check(budget)``, which raises BudgetError for what it cannot do, before a model is loaded, and
``channels_at_once(shape)``, where its plans do not remove single blocks. To add one: write it in a file of this folder
(or of your own package) and name it in a YAML file under ``conf/allocator/``.

Where to read first: ``budget`` says what may be kept. ``uniform``, ``ranking``, ``whole_experts`` and ``merging`` are
complete by themselves. ``coverage`` is the paper's method in three steps: channels for each layer (``layer_budgets``),
for each expert (``covering`` finds the counts for both), and rounding to blocks (``alignment``). ``optimal_coverage``
instead solves for the best widths: a price per block (``relaxation``) gives the bound, and nearly the plan, which
``opening`` completes. ``selection`` turns widths into the channels that stay.
"""
