"""Who may import whom, checked on every import in the source, those inside functions included."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import moeprune

PACKAGE = Path(moeprune.__file__).parent

# A room may import the rooms of the lines above its own, and those that EXTRA names.
ORDER = (
    ("errors",),
    ("types",),
    ("models",),
    ("embedded", "training"),
    ("calibration",),
    ("scoring", "allocation", "surgery", "quantization", "recovery", "evaluation", "export"),
    ("pipeline",),
    ("app",),
)
EXTRA = {"embedded": {"training"}, "app": {"report"}, "__main__": {"app"}}
ONLY_FROM = {"report": {"errors", "types"}, "resources": set(), "__init__": set()}

APP_LIBRARIES = {"hydra", "omegaconf", "wandb", "submitit"}
HEAVY_LIBRARIES = {"torch", "transformers"}
LIGHT_MODULES = ("moeprune.allocation.budget", "moeprune.models.shape", "moeprune.errors")


def module_name(file: Path) -> str:
    parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 2 else parts)


SOURCES = {module_name(file): file.read_text() for file in sorted(PACKAGE.rglob("*.py"))}


def imports(module: str, source: str) -> Iterator[str]:
    """Absolute names of everything that a module imports; of ``from a import b`` both a and a.b."""
    is_package = any(other.startswith(f"{module}.") for other in SOURCES)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")[: len(module.split(".")) - node.level + is_package]
                base = ".".join([*parents, base]).rstrip(".")
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def room(module: str) -> str:
    """The room or top-level module of ours that a name lies in."""
    return module.split(".")[1]


def allowed_rooms(importer: str) -> set[str]:
    if importer in ONLY_FROM:
        return ONLY_FROM[importer]
    rank = next((rank for rank, rooms in enumerate(ORDER) if importer in rooms), 0)
    return {other for rooms in ORDER[:rank] for other in rooms} | EXTRA.get(importer, set())


def wrong_imports(module: str, source: str) -> list[str]:
    """Imports of a module that its place in the order forbids."""
    importer = room(module)
    wrong = []
    for name in imports(module, source):
        library = name.split(".")[0]
        if library == "moeprune":
            ours = name.split(".")[1:]
            if ours and ours[0] != importer and ours[0] not in allowed_rooms(importer):
                wrong.append(f"{module} imports {name}")
        elif (library in APP_LIBRARIES and importer != "app") or (library == "torch" and importer == "report"):
            wrong.append(f"{module} imports {name}")
    return wrong


def reached_libraries(module: str) -> set[str]:
    """Libraries that importing one of our modules loads, through our own modules too."""
    seen, waiting, libraries = set(), [module], set()
    while waiting:
        name = waiting.pop()
        if name in seen or name not in SOURCES:
            continue
        seen.add(name)
        waiting.append(name.rpartition(".")[0])  # importing a module runs the packages around it
        for imported in imports(name, SOURCES[name]):
            waiting.append(imported)
            libraries.add(imported.split(".")[0])
    return libraries


def test_every_room_has_a_place_in_the_order():
    placed = {room for rooms in ORDER for room in rooms} | set(ONLY_FROM) | {"__main__"}
    assert {room(module) for module in SOURCES} == placed


@pytest.mark.parametrize("module", SOURCES)
def test_no_module_imports_what_its_room_may_not(module):
    assert wrong_imports(module, SOURCES[module]) == []


@pytest.mark.parametrize("module", LIGHT_MODULES)
def test_what_checks_a_request_reaches_neither_torch_nor_transformers(module):
    assert not reached_libraries(module) & HEAVY_LIBRARIES


def test_reports_reach_no_torch_through_our_own_modules():
    for module in SOURCES:
        if room(module) == "report":
            assert "torch" not in reached_libraries(module), module


def test_reaching_goes_through_our_own_modules():
    # budget.py stands beside it and is light; bitsandbytes comes by way of the models' room.
    assert "torch" in reached_libraries("moeprune.allocation.covering")
    assert "bitsandbytes" in reached_libraries("moeprune.pipeline.run")


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("moeprune.scoring.mine", "from moeprune.allocation.budget import Budget"),
        ("moeprune.scoring.mine", "from moeprune import surgery"),
        ("moeprune.scoring.mine", "from ..surgery import prune"),
        ("moeprune.scoring", "from ..pipeline.run import run"),
        ("moeprune.models.mine", "import moeprune.calibration.text"),
        ("moeprune.training.mine", "from moeprune.embedded import corpus"),
        ("moeprune.report.mine", "from moeprune.models.shape import read_shape"),
        ("moeprune.report.mine", "def late():\n    import torch.nn"),
        ("moeprune.pipeline.mine", "def late():\n    from hydra.utils import instantiate"),
        ("moeprune.pipeline.mine", "from omegaconf import DictConfig"),
        ("moeprune.pipeline.mine", "from moeprune.app import job"),
        ("moeprune.errors", "from moeprune.types import Plan"),
    ],
)
def test_a_wrong_import_is_caught(module, source):
    assert len(wrong_imports(module, source)) > 0


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("moeprune.scoring.mine", "import torch\nfrom moeprune.types import Scores\nfrom . import attribution"),
        ("moeprune.embedded.mine", "from moeprune.training.loop import train"),
        ("moeprune.app.mine", "import wandb\nfrom moeprune.report.summary import write_run_report"),
        ("moeprune.evaluation.mine", "from moeprune.calibration.windows import TokenWindows"),
    ],
)
def test_a_right_import_passes(module, source):
    assert wrong_imports(module, source) == []
