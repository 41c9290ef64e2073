"""What of a config may leave the machine: no secrets, and no name of the user's home."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HIDDEN = "(hidden)"
SECRET_NAMES = {
    "apikey", "key", "token", "secret", "password", "passwd", "passphrase", "credential", "credentials", "auth",
    "authorization", "cookie",
}  # fmt: skip
# Keys as the common services give them out; a user and password in an address; forty hexadecimal digits.
SECRET_VALUES = re.compile(
    r"\b(?:hf|sk|pk|ghp|gho|ghs|glpat|xox[abp]|wandb)[-_][A-Za-z0-9_-]{16,}"
    r"|\bAKIA[A-Z0-9]{16}\b|\bgithub_pat_\w{20,}|\b[Bb]earer\s+\S{16,}|\beyJ[\w-]{10,}\.[\w-]{10,}"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----|(?<=://)[^/\s:@]*:[^/\s@]+@|(?<![\w/])[0-9a-f]{40}(?![\w/])"
)


def shown(value: Any, name: str = "") -> Any:
    """``value`` of the setting ``name``, with secrets replaced by `HIDDEN` and the home directory by ``~``.

    A setting is taken for a secret when a word of its name says so (``hub.api_key``) and it holds text, or when its
    text looks like a key, a token, or an address with a password. A git commit looks the same as an old W&B key, and
    is hidden unless its setting is a ``revision``.
    """
    if isinstance(value, Mapping):
        return {str(key): shown(inner, str(key)) for key, inner in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [shown(inner, name) for inner in value]
    if not isinstance(value, str) or not value:
        return value
    if SECRET_NAMES & set(re.split(r"[^a-z]+", name.lower())):
        return HIDDEN
    if name != "revision":
        value = SECRET_VALUES.sub(HIDDEN, value)
    return _without_home(value)


def _without_home(text: str) -> str:
    home = str(Path.home())
    if home in ("/", ""):
        return text
    return re.sub(rf"{re.escape(home)}(?=/|$)", "~", text)
