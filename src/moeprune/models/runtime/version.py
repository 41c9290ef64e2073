"""Which transformers a pruned model needs. Asked before anything is imported that older versions lack."""

import re

MINIMUM_TRANSFORMERS = (5, 23)


def check_transformers(version: str) -> None:
    """Raise ImportError where transformers is older than what pruned models are written for."""
    major, minor = re.findall(r"\d+", version)[:2]
    if (int(major), int(minor)) < MINIMUM_TRANSFORMERS:
        needed = ".".join(map(str, MINIMUM_TRANSFORMERS))
        raise ImportError(
            f"This pruned model needs transformers {needed} or newer; {version} is installed. "
            f"Update it: pip install --upgrade 'transformers>={needed}'."
        )
