"""The code that a compressed checkpoint carries, so that transformers loads it where this package is not installed."""

import re
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from moeprune.models import runtime
from moeprune.models.compressed.files import PREFIX, save_text

_RUNTIME = Path(str(runtime.__file__)).parent
_OWN = f"{runtime.__name__}."
_RELATIVE_IMPORT = re.compile(r"^from \.(\w+) import ", re.MULTILINE)
_CODE = '''"""{family} with routed experts of differing widths.

Needs torch and transformers, and bitsandbytes where weights are in NF4 or int8. Load it with
AutoModelForCausalLM.from_pretrained(..., trust_remote_code=True).
"""

import transformers

from .version import check_transformers

check_transformers(transformers.__version__)

{imports}  # noqa: E402

from .structure import make_ragged  # noqa: E402


class Pruned{config}({config}):
    """The family's config, and under ``pruned`` the shapes of the experts."""

    model_type = "{prefix}{family}"


class Pruned{model}({model}):
    """The family's model with the experts that its config describes."""

    config_class = Pruned{config}

    def __init__(self, config):
        super().__init__(config)
        make_ragged(self, config.pruned)
'''


def write_code(
    folder: Path, model_class: type[PreTrainedModel], config_class: type[PreTrainedConfig]
) -> dict[str, Any]:
    """Write the modelling file of a pruned model of this family, and all it imports, into ``folder``.

    Returns what config.json must say for transformers to find it.
    """
    family = config_class.model_type
    config, model = config_class.__name__, model_class.__name__
    module = f"modeling_{PREFIX}{family}"
    code = _CODE.format(
        family=family, prefix=PREFIX, config=config, model=model, imports=_imports(config_class, model_class)
    )
    for name in _imported(code):
        save_text(folder / f"{name}.py", (_RUNTIME / f"{name}.py").read_text())
    save_text(folder / f"{module}.py", code)
    return {
        "model_type": f"{PREFIX}{family}",
        "architectures": [f"Pruned{model}"],
        "auto_map": {"AutoConfig": f"{module}.Pruned{config}", "AutoModelForCausalLM": f"{module}.Pruned{model}"},
    }


def _imports(config_class: type, model_class: type) -> str:
    if model_class.__module__.startswith(_OWN):
        return (
            f"from .{model_class.__module__.removeprefix(_OWN)} import {config_class.__name__}, {model_class.__name__}"
        )
    return f"from transformers import {config_class.__name__}, {model_class.__name__}"


def _imported(code: str) -> set[str]:
    """The runtime files that ``code`` imports, and those that they import."""
    found: set[str] = set()
    waiting = _RELATIVE_IMPORT.findall(code)
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += _RELATIVE_IMPORT.findall((_RUNTIME / f"{name}.py").read_text())
    return found
