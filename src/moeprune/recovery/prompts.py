"""How a record becomes what the model reads and what it should answer."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from moeprune.calibration.fields import first_filled, is_filled, require_fields, require_text, template_fields
from moeprune.calibration.records import Record
from moeprune.errors import InputError


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
            template_fields(template)
        if not template_fields(self.answer):
            raise InputError(f"The answer {self.answer!r} has no field.", change="Write one in braces: {output}.")

    def __call__(self, record: Record, tokenizer: PreTrainedTokenizerBase) -> Turn | None:
        """The turn. Raises InputError when the record has not the fields."""
        answer, prompt = first_filled([self.answer], record), first_filled(self.prompts, record)
        if answer is None or prompt is None:
            return None
        require_text(template_fields(prompt) | template_fields(answer), record)
        return Turn(prompt.format_map(record), answer.format_map(record), ends=False)


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
        require_fields({self.messages}, record)
        messages = record[self.messages]
        if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
            raise InputError(f"{self.messages} is no list of messages: {str(messages)[:60]}.")
        for message in messages:
            require_fields({"role", "content"}, message)
        if len(messages) < 2 or messages[-1]["role"] != "assistant" or not is_filled(messages[-1]["content"]):
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
