"""How a record becomes what the model reads and what it should answer."""

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from moeprune.errors import InputError
from moeprune.recovery.records import Record


@dataclass(frozen=True)
class Turn:
    """A prompt and its answer; ``ends`` where the answer itself says that it is over."""

    prompt: str
    answer: str
    ends: bool


class Template(Protocol):
    """Makes a turn of a record; None for a record without an answer."""

    def __call__(self, record: Record, tokenizer: PreTrainedTokenizerBase) -> Turn | None: ...


@dataclass(frozen=True)
class PromptTemplate:
    """Format strings with a record's fields in braces: ``"Question: {question}\\nAnswer: "``.

    Used is the first of ``prompts`` whose fields all have something in them, so that a longer one with an optional
    field goes before one without. Raises InputError for what is no format string.
    """

    prompts: Sequence[str]
    answer: str

    def __post_init__(self) -> None:
        if isinstance(self.prompts, str) or not self.prompts:
            raise InputError(f"prompts={self.prompts} is no list.", change="Give a list of one or more templates.")
        for template in self.prompts:
            _fields(template)
        if not _fields(self.answer):
            raise InputError(f"The answer {self.answer!r} has no field.", change="Write one in braces: {output}.")

    def __call__(self, record: Record, tokenizer: PreTrainedTokenizerBase) -> Turn | None:
        """The turn. Raises InputError when the record has not the fields."""
        filled = {name for name, value in record.items() if _is_filled(value)}
        _require_fields(_fields(self.answer), record)
        prompt = next((each for each in self.prompts if _fields(each) <= filled), None)
        if prompt is None:
            _require_fields(set().union(*map(_fields, self.prompts)), record)
        if prompt is None or not _fields(self.answer) <= filled:
            return None
        _require_text(_fields(prompt) | _fields(self.answer), record)
        return Turn(prompt.format_map(record), self.answer.format_map(record), ends=False)


@dataclass(frozen=True)
class ChatTemplate:
    """A list of ``{"role", "content"}`` in the field ``messages``, written down by the tokenizer's own chat template.

    The answer is the last message, where it is the assistant's. Earlier answers belong to the prompt: what a template
    makes of them may depend on what comes later (Qwen3's leaves out their reasoning), so they are no sure targets.
    """

    messages: str = "messages"

    def __call__(self, record: Record, tokenizer: PreTrainedTokenizerBase) -> Turn | None:
        """The turn. Raises InputError for a tokenizer without a chat template, or for messages that it cannot write."""
        if tokenizer.chat_template is None:
            raise InputError(
                "The model's tokenizer has no chat template, which chats need.",
                change="Use data with a prompt template of its own, such as training_data=alpaca.",
            )
        _require_fields({self.messages}, record)
        messages = record[self.messages]
        if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
            raise InputError(f"{self.messages} is no list of messages: {str(messages)[:60]}.")
        for message in messages:
            _require_fields({"role", "content"}, message)
        if len(messages) < 2 or messages[-1]["role"] != "assistant" or not _is_filled(messages[-1]["content"]):
            return None
        prompt = _written(tokenizer, messages[:-1], asks=True)
        whole = _written(tokenizer, messages, asks=False)
        if not whole.startswith(prompt):
            raise InputError(
                "With this tokenizer's chat template a chat does not begin with its own prompt, so what is the answer "
                "cannot be told.",
                change="Use data with a prompt template of its own, such as training_data=alpaca.",
            )
        return Turn(prompt, whole.removeprefix(prompt), ends=True)


def _written(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], *, asks: bool) -> str:
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=asks))
    except (TemplateError, TypeError) as error:  # of another type where contents are no text
        roles = ", ".join(str(message["role"]) for message in messages)
        raise InputError(f"The chat template cannot write messages of {roles}: {error}.") from error


def _fields(template: str) -> set[str]:
    """The fields in braces. Raises InputError for what is no format string of plain names."""
    change = "Write a record's field in braces, {output}, and a brace itself as {{ or }}."
    try:
        parts = [part for part in string.Formatter().parse(template) if part[1] is not None]
    except (ValueError, TypeError) as error:
        raise InputError(f"The template {template!r} is not possible: {error}.", change=change) from None
    if not all(name and name.isidentifier() and not spec and not conversion for _, name, spec, conversion in parts):
        raise InputError(f"The template {template!r} has fields that are more or less than a name.", change=change)
    return {str(name) for _, name, _, _ in parts}


def _is_filled(value: object) -> bool:
    """Whether there is something to read; NaN is how tables without a value there come out as JSON."""
    return value is not None and value == value and bool(str(value).strip())


def _require_text(fields: set[str], record: Record) -> None:
    """Raise InputError for lists and objects, which would be written in Python's notation."""
    for name in sorted(fields):
        value = record[name]
        if isinstance(value, (Mapping, Sequence)) and not isinstance(value, str):
            raise InputError(
                f"The field {name} of a record is a {type(value).__name__}, not text: {str(value)[:60]}.",
                change="Give text in a field of its own; for a list of messages use training_data=chat_file.",
            )


def _require_fields(fields: set[str], record: Record) -> None:
    missing = sorted(fields - set(record))
    if missing:
        raise InputError(
            f"A record of the training data has no field {', '.join(missing)}.",
            possible=record,
            given=missing[0],
            change="Name the fields of your data in the template.",
        )
