"""Tasks that run the code that a model writes: only when the user allows it, and only while they do."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from moeprune.errors import InputError

# Without this variable, the metric that runs code refuses to.
PERMISSION = "HF_ALLOW_CODE_EVAL"


def require_permission(task: str, allowed: bool) -> None:
    """Raise InputError where the task runs generated code and the user has not allowed it."""
    if not allowed:
        raise InputError(
            f"Task {task!r} runs the Python code that the model writes: on this machine, as you, with all you may do.",
            change="If that is what you want, best in a container without a network and without your files, set "
            "evaluation.run_generated_code=true.",
        )


@contextmanager
def code_may_run(allowed: bool) -> Iterator[None]:
    """Within the context the metric that runs code has the permission, if ``allowed``; then what was there before."""
    before = os.environ.get(PERMISSION)
    if allowed:
        os.environ[PERMISSION] = "1"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(PERMISSION, None)
        else:
            os.environ[PERMISSION] = before
