"""Templates: which is used, what it makes of a record, what it refuses."""

import math

import pytest

from moeprune.errors import InputError
from moeprune.recovery.prompts import ChatTemplate, PromptTemplate, Turn

CHATS = "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}{{ '[assistant]' if add_generation_prompt }}"
ALPACA = PromptTemplate(["Do {instruction} with {input}:\n", "Do {instruction}:\n"], "{output}!")


@pytest.fixture
def chats(byte_tokenizer, monkeypatch):
    """The byte tokenizer with a chat template."""
    monkeypatch.setattr(byte_tokenizer, "chat_template", CHATS, raising=False)
    return byte_tokenizer


@pytest.mark.parametrize(
    ("record", "prompt"),
    [
        ({"instruction": "add", "input": "2 {x}", "output": "4"}, "Do add with 2 {x}:\n"),
        ({"instruction": "add", "input": " \n", "output": "4"}, "Do add:\n"),
        ({"instruction": "add", "input": None, "output": "4"}, "Do add:\n"),
        ({"instruction": "add", "output": "4"}, "Do add:\n"),
        ({"instruction": "add", "input": math.nan, "output": "4"}, "Do add:\n"),
        ({"instruction": "add", "input": 0, "output": 4}, "Do add with 0:\n"),
    ],
)
def test_the_first_prompt_that_can_be_filled_is_used(byte_tokenizer, record, prompt):
    assert ALPACA(record, byte_tokenizer) == Turn(prompt, "4!", ends=False)


@pytest.mark.parametrize("record", [{"instruction": "add", "output": ""}, {"instruction": "", "output": "4"}])
def test_a_record_with_nothing_to_say_is_no_turn(byte_tokenizer, record):
    assert ALPACA({"input": "", **record}, byte_tokenizer) is None


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"instruction": "add", "answer": "4"}, "(?s)no field output.*Possible: instruction, answer"),
        ({"question": "add", "output": "4"}, "(?s)no field input, instruction.*Possible: question, output"),
    ],
)
def test_a_field_that_does_not_exist_is_an_input_error_with_those_that_do(byte_tokenizer, record, reason):
    with pytest.raises(InputError, match=reason):
        ALPACA(record, byte_tokenizer)


@pytest.mark.parametrize(
    ("prompts", "answer", "reason"),
    [
        ("{instruction}", "{output}", "is no list"),
        ([], "{output}", "is no list"),
        (["{instruction"], "{output}", "not possible"),
        ([5], "{output}", "not possible: expected str"),
        (["{instruction}"], None, "not possible: expected str"),
        (["{}"], "{output}", "more or less than a name"),
        (["{a.b}"], "{output}", "more or less than a name"),
        (["{a:d}"], "{output}", "more or less than a name"),
        (["{a:{b}}"], "{output}", "more or less than a name"),
        (["{a}"], "{output!x}", "more or less than a name"),
        (["{instruction}"], "yes", "has no field"),
    ],
)
def test_a_template_that_cannot_work_is_an_input_error(prompts, answer, reason):
    with pytest.raises(InputError, match=reason):
        PromptTemplate(prompts, answer)


@pytest.mark.parametrize("value", [["4"], [], {"text": "4"}])
@pytest.mark.parametrize("field", ["instruction", "input", "output"])
def test_lists_and_objects_are_no_text(byte_tokenizer, field, value):
    record = {"instruction": "add", "input": "2", "output": "4", field: value}
    with pytest.raises(InputError, match=f"field {field} of a record is a (list|dict), not text"):
        ALPACA(record, byte_tokenizer)


def message(role, content):
    return {"role": role, "content": content}


def test_the_last_answer_of_a_chat_is_the_answer(chats):
    record = {
        "messages": [message("user", "a"), message("assistant", "b"), message("user", "c"), message("assistant", "d")]
    }
    expected = Turn("[user]a\n[assistant]b\n[user]c\n[assistant]", "d\n", ends=True)
    assert ChatTemplate()(record, chats) == expected
    assert ChatTemplate("chat")({"chat": record["messages"]}, chats) == expected


@pytest.mark.parametrize("messages", [[], [("assistant", "b")], [("user", "a")], [("user", "a"), ("assistant", " ")]])
def test_a_chat_without_a_question_and_an_answer_is_no_turn(chats, messages):
    assert ChatTemplate()({"messages": [message(*each) for each in messages]}, chats) is None


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"text": "a"}, "no field messages"),
        ({"messages": "a"}, "is no list of messages"),
        ({"messages": [{"from": "human", "value": "a"}]}, "no field content, role"),
    ],
)
def test_a_chat_of_another_form_is_an_input_error(chats, record, reason):
    with pytest.raises(InputError, match=reason):
        ChatTemplate()(record, chats)


def test_a_tokenizer_without_a_chat_template_is_an_input_error(byte_tokenizer):
    with pytest.raises(InputError, match="no chat template"):
        ChatTemplate()({"messages": [message("user", "a"), message("assistant", "b")]}, byte_tokenizer)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('no such role') }}", "cannot write messages of user: no such role"),
        ("{{ messages[0].content + 1 }}", "cannot write messages of user: can only concatenate"),
        ("{{ messages | length }}", "does not begin with its own prompt"),
    ],
)
def test_a_chat_template_that_cannot_be_used_is_an_input_error(chats, monkeypatch, template, reason):
    monkeypatch.setattr(chats, "chat_template", template)
    with pytest.raises(InputError, match=reason):
        ChatTemplate()({"messages": [message("user", "a"), message("assistant", "b")]}, chats)
