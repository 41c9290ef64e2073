"""Recovery: from a pruned model in memory to the same model trained a little further.

The place in the road is there (`pipeline/run.py`, between pruning and quantisation); ``recovery=none`` leaves it empty.
"""
