"""Turns errors of Hydra and OmegaConf about a user's command into one message with the nearest valid choices."""

import errno
import re
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import yaml
from hydra.conf import HydraConf
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException, OverrideParseException
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from moeprune.errors import InputError, MoepruneError

UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.ENOTDIR)


def explained(
    error: Exception, config_folder: Path, config_name: str, words: Sequence[str] = ()
) -> MoepruneError | None:
    """The user's mistake behind ``error``, in a command of these words; None when it is not one."""
    if isinstance(error, MissingConfigException):
        return _missing_choice(error, config_folder)
    if isinstance(error, MissingMandatoryValue):
        return InputError(str(error).splitlines()[0], change="Give it on the command line as KEY=VALUE.")
    if isinstance(error, OverrideParseException):
        return InputError(str(error).splitlines()[0], change="Overrides are KEY=VALUE, for example ratio=0.5.")
    if isinstance(error, ConfigCompositionException):
        if "Ambiguous value" in str(error):
            return InputError(str(error).splitlines()[0], change="Add --multirun to run several values.")
        return _unknown_key(error, config_folder, config_name, words)
    if isinstance(error, (OmegaConfBaseException, HydraException)):
        return InputError(str(error).splitlines()[0], change="See the composed config with --cfg job.")
    if isinstance(error, OSError) and error.errno in UNWRITABLE:
        return MoepruneError(
            f"{error.filename or 'The run directory'} cannot be written: {error.strerror}.\n"
            "Free some space, or choose other places with hydra.run.dir=/path and cache_dir=/path."
        )
    return None


def _missing_choice(error: MissingConfigException, config_folder: Path) -> MoepruneError:
    asked = str(error.missing_cfg_file or "")
    group, _, choice = asked.rpartition("/")
    if asked.startswith("model/") and asked.count("/") > 1:
        path = asked.removeprefix("model/")
        return InputError(f"model={path} does not exist.", change=f"Use model=checkpoint model.path={path}")
    if not group or not error.options:
        return InputError(str(error).splitlines()[0])
    possible = list(error.options)
    if group.startswith("experiment/"):  # the one group with folders, which Hydra does not look into
        group, _, folder = group.partition("/")
        choice = f"{folder}/{choice}"
        possible += sorted(f"{folder}/{file.stem}" for file in (config_folder / group / folder).glob("*.yaml"))
    return InputError(f"{group}={choice} does not exist.", possible=possible, given=choice)


def _unknown_key(
    error: ConfigCompositionException, config_folder: Path, config_name: str, words: Sequence[str]
) -> MoepruneError:
    first_line = str(error).splitlines()[0]
    match = re.search(r"Could not (?:override|append to config|delete from config)[^']*'([^'=@]+)", first_line)
    if match is None:
        return InputError(first_line, change="See the composed config with --cfg job.")
    asked = match[1].split("=")[0]
    if asked.startswith("hydra."):
        return _unknown_to_hydra(asked, config_folder / "hydra", words)
    known = known_keys(config_folder, config_name)
    group = asked.split(".")[0]
    if "." in asked and group in known:
        inside = _holders_of_keys(config_folder / group)
        setting = ".".join(asked.split(".")[:2])
        if setting in inside:
            return InputError(
                f"{asked} is not a setting of the {group} that is chosen, in this job at least.",
                change=f"{setting} is there in {group}={', '.join(inside[setting])}. In a sweep that has others too, "
                f"write ++{asked}=VALUE.",
            )
        return InputError(f"{asked} is not a setting of any {group}.", possible=sorted(inside), given=asked)
    return InputError(f"{asked} is neither a group nor a setting.", possible=known, given=asked)


def _unknown_to_hydra(asked: str, folder: Path, words: Sequence[str]) -> MoepruneError:
    group, _, key = asked.removeprefix("hydra.").partition(".")
    if group not in ("launcher", "sweeper"):
        possible = [f"hydra.{field.name}" for field in fields(HydraConf)]
        return InputError(f"{asked} is not a setting of Hydra.", possible=possible, given=f"hydra.{group}")
    prefix = f"hydra/{group}="
    chosen = next((word.removeprefix(prefix) for word in reversed(words) if word.startswith(prefix)), "basic")
    settings = {file.stem: _settings_of(file) for file in sorted((folder / group).glob("*.yaml"))}
    if key.split(".")[0] in settings.get(chosen, ()):
        return InputError(f"{asked} is not there yet.", change=f"Add it with a + before: +{asked}=VALUE.")
    others = [choice for choice, has in settings.items() if key in has]
    return InputError(
        f"{asked} is not a setting of {prefix}{chosen}.",
        possible=[f"hydra.{group}.{name}" for name in settings.get(chosen, ())],
        given=asked,
        change=f"It is one of {prefix}NAME, where NAME is {' or '.join(others)}." if others else None,
    )


def _settings_of(file: Path) -> list[str]:
    """The settings of one choice, and of the choices that it begins with."""
    content = yaml.safe_load(file.read_text()) or {}
    bases = [base for base in content.pop("defaults", ()) if isinstance(base, str) and base != "_self_"]
    inherited = [name for base in bases for name in _settings_of(file.with_name(f"{base}.yaml"))]
    return list(dict.fromkeys([*inherited, *(name for name in content if name not in ("_target_", "hydra"))]))


def known_keys(config_folder: Path, config_name: str) -> list[str]:
    """Groups and top-level settings of the primary config."""
    primary = yaml.safe_load((config_folder / f"{config_name}.yaml").read_text())
    groups = [group for entry in primary["defaults"] if isinstance(entry, dict) for group in entry]
    return groups + [key for key in primary if key not in ("defaults", "hydra")]


def _holders_of_keys(folder: Path) -> dict[str, list[str]]:
    """The settings of a group by their dotted names, each with the choices that have it."""
    keys: dict[str, list[str]] = {}
    for file in sorted(folder.glob("*.yaml")):
        for name in _settings_of(file):
            keys.setdefault(f"{folder.name}.{name}", []).append(file.stem)
    return keys
