"""The predicted KV cache against the tensors that transformers keeps, in every family."""

import pytest
import torch
from families import FAMILIES, build_family

from moeprune.models.footprint.kv_cache import cache_size

BATCH = 2


def kept_bytes(cache) -> int:
    """Bytes of all numbers that the cache holds, wherever it holds them."""
    waiting: list[object] = [vars(cache)]
    seen: dict[int, int] = {}
    while waiting:
        value = waiting.pop()
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            seen[id(value)] = value.nbytes
        elif isinstance(value, dict):
            waiting += value.values()
        elif isinstance(value, list | tuple):
            waiting += value
        elif hasattr(value, "is_compileable"):  # a layer of the cache
            waiting.append(vars(value))
    return sum(seen.values())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("context", [5, 21], ids=["inside the windows", "beyond the windows"])
@torch.no_grad()
def test_the_cache_is_as_large_as_predicted(family, context):
    model = build_family(family, torch.bfloat16)
    ids = torch.randint(1, 200, (BATCH, context), generator=torch.Generator().manual_seed(0))
    cache = model(ids, use_cache=True).past_key_values
    assert kept_bytes(cache) == BATCH * cache_size(model.config, context, 2).at_context


@pytest.mark.parametrize("family", FAMILIES)
def test_inside_all_windows_each_token_adds_the_same(family):
    config = FAMILIES[family]()
    two, three = (cache_size(config, context, 2) for context in (2, 3))
    assert three.at_context - two.at_context == two.per_token
