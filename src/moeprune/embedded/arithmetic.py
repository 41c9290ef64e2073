"""A generated domain: short exact problems, unlike any of the prose around them."""

import random


def arithmetic_lines(count: int, seed: int = 0) -> list[str]:
    """Lines such as ``17 + 25 = 42``, ``3, 6, 9, 12`` or ``sort 5 2 9 -> 2 5 9``; the same for the same seed."""
    rng = random.Random(seed)
    kinds = (_sum, _difference, _product, _sequence, _sorted, _copied)
    return [rng.choice(kinds)(rng) for _ in range(count)]


def _sum(rng: random.Random) -> str:
    a, b = rng.randrange(100), rng.randrange(100)
    return f"{a} + {b} = {a + b}"


def _difference(rng: random.Random) -> str:
    b, difference = rng.randrange(100), rng.randrange(100)
    return f"{b + difference} - {b} = {difference}"


def _product(rng: random.Random) -> str:
    a, b = rng.randrange(13), rng.randrange(13)
    return f"{a} * {b} = {a * b}"


def _sequence(rng: random.Random) -> str:
    start, step = rng.randrange(50), rng.randrange(1, 10)
    return ", ".join(str(start + step * i) for i in range(8))


def _sorted(rng: random.Random) -> str:
    numbers = [rng.randrange(100) for _ in range(5)]
    return f"sort {' '.join(map(str, numbers))} -> {' '.join(map(str, sorted(numbers)))}"


def _copied(rng: random.Random) -> str:
    numbers = " ".join(str(rng.randrange(100)) for _ in range(6))
    return f"copy {numbers} -> {numbers}"
