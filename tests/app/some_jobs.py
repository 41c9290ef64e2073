"""A few jobs of a sweep that say as much as all of them of whether it is sound."""


def each_value_once(jobs: list[list[str]]) -> list[list[str]]:
    """So many of the jobs, at least one, that each setting has each of its values at least once."""
    chosen: list[list[str]] = []
    seen: set[str] = set()
    while left := [job for job in jobs if set(job) - seen or not chosen]:
        chosen.append(max(left, key=lambda job: len(set(job) - seen)))
        seen |= set(chosen[-1])
    return chosen
