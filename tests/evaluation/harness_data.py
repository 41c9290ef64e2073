"""The data sets of lm-eval's tasks in small: the splits and fields of each, with sentences of our own."""

from collections.abc import Sequence
from typing import Any

from datasets import Dataset, DatasetDict

Records = Sequence[dict[str, Any]]


def _arc(question: str, choices: Sequence[str], right: int) -> dict[str, Any]:
    labels = "ABCD"[: len(choices)]
    return {
        "id": question[:8], "question": question, "choices": {"text": list(choices), "label": list(labels)},
        "answerKey": labels[right],
    }  # fmt: skip


ARC = [
    _arc("What keeps a kettle's handle cool?", ["wood", "steam", "the spout", "water"], 0),
    _arc("Which of these falls in autumn?", ["a stone wall", "leaves", "the tide table"], 1),
    _arc("What does a barometer tell?", ["the hour", "who called", "the weather to come", "a joke"], 2),
]

HELLASWAG = [
    {
        "ind": 1, "activity_label": "Mending a net", "ctx_a": "An old man sits on a crate.", "ctx_b": "he",
        "ctx": "An old man sits on a crate. he",
        "endings": ["threads a needle with twine.", "[header] flies off.", "is a crate.", "rains on Tuesday."],
        "source_id": "none", "split": "val", "split_type": "indomain", "label": "0",
    },
    {
        "ind": 2, "activity_label": "Baking bread", "ctx_a": "The dough has risen.", "ctx_b": "a woman",
        "ctx": "The dough has risen. a woman",
        "endings": ["sails to the island.", "sells the window.", "puts it into the oven.", "counts to nine."],
        "source_id": "none", "split": "val", "split_type": "indomain", "label": "2",
    },
]  # fmt: skip

PIQA = [
    {"goal": "To dry a wet boot,", "sol1": "stuff it with paper.", "sol2": "stuff it with snow.", "label": 0},
    {"goal": "To find a stud in a wall,", "sol1": "ask the floor.", "sol2": "knock and listen.", "label": 1},
]

BOOLQ = [
    {"question": "is the mill still turning", "passage": "The mill burnt down in spring.", "idx": 0, "label": 0},
    {"question": "do ferries run in winter", "passage": "Ferries run all year but for ice.", "idx": 1, "label": 1},
]

WINOGRANDE = [
    {
        "sentence": "The cart would not fit the lane because the _ was too wide.",
        "option1": "cart", "option2": "lane", "answer": "1",
    },
    {
        "sentence": "Ida asked Ruth for salt, and _ handed it over.",
        "option1": "Ida", "option2": "Ruth", "answer": "2",
    },
    {
        "sentence": "The rope held the boat although the _ was old.",
        "option1": "boat", "option2": "rope", "answer": "2",
    },
]  # fmt: skip

MMLU = [
    {"question": "How many legs have two hens?", "subject": "any", "choices": ["2", "4", "6", "8"], "answer": 1},
    {"question": "Which is a colour?", "subject": "any", "choices": ["loud", "late", "green", "flat"], "answer": 2},
]

GSM8K = [
    {"question": f"A crate holds {n} jars. How many do 3 crates hold?", "answer": f"3 times {n}.\n#### {3 * n}"}
    for n in range(2, 9)
]

HUMANEVAL = [
    {
        "task_id": "Ours/0", "prompt": 'def double(n):\n    """Twice n."""\n    return 2 * n\n',
        "canonical_solution": "", "test": "def check(f):\n    assert f(3) == 6\n", "entry_point": "double",
    },
    {
        "task_id": "Ours/1", "prompt": 'def half(n):\n    """n over two."""\n',
        "canonical_solution": "    return n / 2\n", "test": "def check(f):\n    assert f(6) == 3\n",
        "entry_point": "half",
    },
]  # fmt: skip

GPQA = [
    {
        "Question": f"What is {n} times {n}?", "Correct Answer": str(n * n),
        "Incorrect Answer 1": f"{n}", "Incorrect Answer 2": f"{n + n}", "Incorrect Answer 3": "less",
    }
    for n in range(3, 15)
]  # fmt: skip

DATA_SETS: dict[str, dict[str, Records]] = {
    "allenai/ai2_arc": {"train": ARC, "validation": ARC, "test": ARC},
    "Rowan/hellaswag": {"train": HELLASWAG, "validation": HELLASWAG},
    "baber/piqa": {"train": PIQA, "validation": PIQA},
    "aps/super_glue": {"train": BOOLQ, "validation": BOOLQ},
    "allenai/winogrande": {"train": WINOGRANDE, "validation": WINOGRANDE},
    "cais/mmlu": {"test": MMLU, "validation": MMLU, "dev": MMLU},
    "openai/gsm8k": {"train": GSM8K, "test": GSM8K[:2]},
    "Idavidrein/gpqa": {"train": GPQA},
    "openai/openai_humaneval": {"test": HUMANEVAL},
}


def load_dataset(path: str, name: str | None = None, **settings: Any) -> DatasetDict:
    """Stands for the hub."""
    return DatasetDict({split: Dataset.from_list(list(records)) for split, records in DATA_SETS[path].items()})


# Stands for the metric of that name on the hub, which this one is not a copy of: it runs each program by itself.
CODE_EVAL = """
import os
import subprocess
import sys

import datasets
import evaluate


class CodeEval(evaluate.Metric):
    def _info(self):
        text = datasets.Value("string")
        features = datasets.Features({"predictions": datasets.Sequence(text), "references": text})
        return evaluate.MetricInfo(description="", citation="", features=features)

    def _compute(self, predictions, references, k):
        if os.environ.get("HF_ALLOW_CODE_EVAL") != "1":
            raise ValueError("not allowed")
        passed = 0
        for candidates, test in zip(predictions, references):
            program = candidates[0] + "\\n" + test
            passed += subprocess.run([sys.executable, "-c", program], capture_output=True).returncode == 0
        return {"pass@1": passed / len(references)}, {}
"""
