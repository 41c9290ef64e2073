"""The site file: what is the same for every sweep on a cluster, written once by its user.

``conf/hydra/launcher/slurm.yaml`` refers to it as ``${site:KEY,DEFAULT}``, so that an experiment's own setting and the
command line go before it.
"""

import os
from pathlib import Path
from typing import Any

import yaml
from omegaconf import Container, OmegaConf

from moeprune.app.main import config_folder
from moeprune.errors import InputError

VARIABLE = "MOEPRUNE_SITE"
PROFILES = "profiles"
KEYS = (
    "partition", "account", "qos", "constraint", "nodelist", "exclude", "timeout_min", "cpus_per_task", "mem_gb",
    "gpus_per_node", "gres", "exclusive", "array_parallelism", "requeue", "max_num_timeout", "signal_delay_s", "setup",
    "srun_args", "additional_parameters",
)  # fmt: skip


def register_site_resolver() -> None:
    """Make ``${site:KEY,DEFAULT}`` known to every config."""
    OmegaConf.register_new_resolver("site", _site_value, replace=True)


def site_file() -> Path | None:
    """The site file: the one that ``MOEPRUNE_SITE`` names, else ``~/.config/moeprune/site.yaml`` if it exists."""
    named = os.environ.get(VARIABLE)
    if named:
        return Path(named).expanduser()
    usual = Path(os.environ.get("XDG_CONFIG_HOME") or "~/.config").expanduser() / "moeprune" / "site.yaml"
    return usual if usual.exists() else None


def site_settings(profile: str) -> dict[str, Any]:
    """The site's settings for ``hydra/launcher=profile``: the general ones, and over them the profile's own.

    Raises InputError for a file that is missing or no YAML, and for a key that no launcher has.
    """
    file = site_file()
    if file is None:
        return {}
    try:
        content = yaml.safe_load(file.read_text()) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(
            f"The site file {file} cannot be read: {' '.join(str(error).split())}",
            change=f"Correct it, or name another in {VARIABLE} (/dev/null for none).",
        ) from error
    general = _checked(file, content, where="")
    profiles = general.pop(PROFILES, None) or {}
    _require_mapping(file, profiles, PROFILES)
    for name in profiles:
        if name not in launchers():
            raise InputError(
                f"The site file {file}: there is no launcher {name}.", possible=launchers(), given=str(name)
            )
    own = {name: _checked(file, settings or {}, where=f"{PROFILES}.{name}.") for name, settings in profiles.items()}
    return {**general, **own.get(profile, {})}


def launchers() -> list[str]:
    """The choices of ``hydra/launcher`` that read the site file."""
    return sorted(file.stem for file in (config_folder() / "hydra" / "launcher").glob("slurm*.yaml"))


def _checked(file: Path, settings: Any, where: str) -> dict[str, Any]:
    _require_mapping(file, settings, where.rstrip(".") or "the file")
    possible = KEYS if where else (*KEYS, PROFILES)
    for key in settings:
        if key not in possible:
            raise InputError(f"The site file {file} sets {where}{key}.", possible=possible, given=str(key))
    return dict(settings)


def _require_mapping(file: Path, value: Any, name: str) -> None:
    if not isinstance(value, dict):
        raise InputError(
            f"The site file {file}: {name} is not a mapping.",
            change="Write KEY: VALUE lines, as slurm/site_example.yaml does.",
        )


def _site_value(key: str, default: Any, *, _root_: Container) -> Any:
    try:
        settings = site_settings(str(OmegaConf.select(_root_, "hydra.runtime.choices.hydra/launcher")))
    except InputError:
        # OmegaConf would bury the message in its own; the launcher reads the file again and raises it plainly.
        return default
    return settings.get(key, default)
