"""Documentation stays true: commands compose, links lead somewhere, the README's tree is the tree."""

import re
import shlex
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser

ROOT = Path(__file__).parents[1]
CONF = ROOT / "conf"
PAGES = sorted([ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("sweeps/*.md"), *ROOT.glob("slurm/*.md")])
COMMAND = re.compile(r"^ {4}(?:PYTHONPATH=\. )?(moeprune(?:-[a-z]+)? .+|sbatch slurm/driver\.sbatch .+)$", re.MULTILINE)
# These take folders and flags; tests/app tries them.
WITHOUT_CONFIG = ("moeprune-status", "moeprune-rerun", "moeprune-cache", "moeprune-report")
LINK = re.compile(r"\]\((?!https?:)([^)#]+)\)")


def documented_commands() -> list[tuple[str, str]]:
    return [(page.name, command) for page in PAGES for command in COMMAND.findall(page.read_text())]


def first_choices(overrides: list[str]) -> list[str]:
    """Each override of a sweep with the first of its values."""
    chosen = []
    for text, override in zip(overrides, OverridesParser.create().parse_overrides(overrides), strict=True):
        is_sweep = override.is_sweep_override()
        chosen.append(f"{text.split('=', 1)[0]}={override.sweep_string_iterator().__next__()}" if is_sweep else text)
    return chosen


def composes(overrides: list[str], config_name: str = "config") -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        compose(config_name, overrides=first_choices(overrides), return_hydra_config=True)


@pytest.mark.parametrize(("page", "command"), documented_commands())
def test_documented_command_composes(page: str, command: str) -> None:
    program, *words = shlex.split(command)
    if program in WITHOUT_CONFIG:
        assert (Path(sys.executable).parent / program).exists()
        return
    if "my_conf" in words:
        pytest.skip("names a folder of the reader's own; own plug-ins are tested in tests/app")
    overrides = [word for word in words if "=" in word]
    composes(overrides, program.removeprefix("moeprune-") if "-" in program else "config")


def test_commands_are_found_in_the_docs() -> None:
    assert len(documented_commands()) > 15


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_lead_somewhere(page: Path) -> None:
    broken = [target for target in LINK.findall(page.read_text()) if not (page.parent / target).exists()]
    assert not broken


def test_the_notebook_lines_of_the_readme_run() -> None:
    (lines,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    names: dict[str, object] = {}
    exec(lines, names)
    parameters = sum(parameter.numel() for parameter in names["small"].parameters())
    assert parameters < 0.65 * 4_339_648


def test_the_tree_of_the_readme_names_every_room() -> None:
    readme = (ROOT / "README.md").read_text()
    rooms = [folder.name for folder in (ROOT / "src" / "moeprune").iterdir() if (folder / "__init__.py").exists()]
    assert [room for room in rooms if f"{room}/" not in readme] == []


def test_every_choice_is_documented_on_the_page_of_its_group() -> None:
    missing = []
    for group in (folder for folder in (*CONF.iterdir(), *(CONF / "hydra").iterdir()) if list(folder.glob("*.yaml"))):
        page = ROOT / "docs" / ("method.md" if group.name == "experiment" else f"{group.name}.md")
        text = page.read_text()
        missing += [f"{group.name}={file.stem}" for file in group.glob("*.yaml") if f"`{file.stem}`" not in text]
    assert missing == []
