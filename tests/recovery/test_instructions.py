"""Instruction data: what is a label, what is left out, the same for the same seed."""

import json
import logging

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from moeprune.calibration.records import RecordSource
from moeprune.errors import InputError
from moeprune.recovery.instructions import InstructionData
from moeprune.recovery.prompts import ChatTemplate, PromptTemplate

TEMPLATE = PromptTemplate(["Q{question}\n"], "{answer}")


@pytest.fixture
def data(tmp_path):
    """``data(records, ...)``: instruction data of a file, with windows of 32 tokens unless said otherwise."""

    def made(records, **changes):
        (tmp_path / "records.json").write_text(json.dumps(records))
        source = RecordSource(str(tmp_path / "records.json"))
        settings = {"template": TEMPLATE, "windows": None, "sequence_length": 32, "seed": 0}
        return InstructionData(source, **{**settings, **changes})

    return made


@pytest.fixture
def begin_and_end(byte_tokenizer):
    """The byte tokenizer with tokens of its own for begin (257), end (258), and padding (259)."""
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer.backend_tokenizer, **special)


def labels_of(windows, tokenizer, row=0):
    return tokenizer.decode(windows.labels_NT[row][windows.labels_NT[row] != -100])


ONE = [{"question": "two", "answer": "2"}]


def test_the_answer_and_its_end_are_labels(data, begin_and_end):
    windows = data(ONE, sequence_length=12)(begin_and_end)
    assert begin_and_end.decode(windows.input_ids_NT[0]) == "<s>Qtwo\n2</s>" + "<pad>" * 4
    assert labels_of(windows, begin_and_end) == "2</s>"
    labels_T = windows.labels_NT[0]
    assert torch.equal(labels_T[labels_T != -100], windows.input_ids_NT[0][labels_T != -100])


def test_with_train_on_prompt_all_but_the_begin_token_are_labels(data, begin_and_end):
    windows = data(ONE, sequence_length=12, train_on_prompt=True)(begin_and_end)
    assert labels_of(windows, begin_and_end) == "Qtwo\n2</s>"


def test_packed_examples_follow_each_other(data, byte_tokenizer, begin_and_end):
    records = [{"question": str(number), "answer": "a" * number} for number in range(1, 4)]
    (window,) = data(records)(byte_tokenizer).input_ids_NT
    texts = ["", *(f"Q{number}\n{'a' * number}" for number in range(1, 4))]
    between = byte_tokenizer.decode(window).split(byte_tokenizer.eos_token)
    assert sorted(set(between)) == texts and between[4:] == [""] * len(between[4:])
    (window,) = data(records)(begin_and_end).input_ids_NT
    whole, *padding = begin_and_end.decode(window).split("<pad>")
    assert sorted(whole.split("</s>")) == ["", *(f"<s>{text}" for text in texts[1:])]
    assert padding == [""] * len(padding)


def test_without_packing_each_example_has_a_window(data, byte_tokenizer):
    windows = data([{"question": str(number), "answer": "a"} for number in range(5)], pack=False)(byte_tokenizer)
    assert len(windows) == 5
    assert all(labels_of(windows, byte_tokenizer, row) == "a<|endoftext|>" for row in range(5))


def test_a_token_across_the_border_is_a_label(data, byte_tokenizer):
    """é is two bytes; where the prompt ends with the first character of a token, its rest belongs to the answer."""
    tokenizer = byte_tokenizer
    windows = data(ONE, template=PromptTemplate(["é{question}"], "é{answer}"))(tokenizer)
    assert labels_of(windows, tokenizer) == "é2<|endoftext|>"


def test_long_examples_lose_their_end_and_long_prompts_their_place(data, byte_tokenizer, caplog):
    records = [
        {"question": "short", "answer": "x" * 40},
        {"question": "q" * 40, "answer": "y"},
        {"question": "nothing", "answer": ""},
        {"question": "fits", "answer": "z"},
    ]
    with caplog.at_level(logging.INFO):
        windows = data(records)(byte_tokenizer)
    labels = sorted(labels_of(windows, byte_tokenizer, row) for row in range(len(windows)))
    assert labels == ["x" * 24, "z<|endoftext|>"]
    assert "2 used, 1 with a prompt that fills a window, 1 without an answer" in caplog.text


def test_a_prompt_that_fills_a_window_is_used_where_prompts_are_labels(data, byte_tokenizer):
    windows = data([{"question": "q" * 40, "answer": "y"}], train_on_prompt=True)(byte_tokenizer)
    assert labels_of(windows, byte_tokenizer) == "Q" + "q" * 30


@pytest.fixture
def many(data):
    """``many(...)``: data of 40 short records."""
    return lambda **changes: data([{"question": str(n), "answer": f"{n * n}"} for n in range(40)], **changes)


def test_the_order_depends_on_the_seed_only(many, byte_tokenizer):
    first, again, other = (many(seed=seed)(byte_tokenizer).input_ids_NT for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_windows_limits_the_windows_and_says_where_there_are_fewer(many, byte_tokenizer, caplog):
    whole = many()(byte_tokenizer)
    assert len(many(windows=3)(byte_tokenizer)) == 3
    assert not caplog.records
    assert len(many(windows=1000)(byte_tokenizer)) == len(whole)
    assert f"the records fill {len(whole)} windows; 1000 were asked for" in caplog.text


def test_chats_write_their_own_begin_and_end(data, byte_tokenizer, monkeypatch):
    template = "<{% for m in messages %}{{ m.role[0] }}{{ m.content }};{% endfor %}{{ 'a' if add_generation_prompt }}"
    monkeypatch.setattr(byte_tokenizer, "chat_template", template, raising=False)
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    windows = data([{"messages": messages}], template=ChatTemplate(), sequence_length=10)(byte_tokenizer)
    assert byte_tokenizer.decode(windows.input_ids_NT[0]) == "<uhi;ayes;"
    assert labels_of(windows, byte_tokenizer) == "yes;"
    windows = data([{"messages": messages}], template=ChatTemplate(), train_on_prompt=True)(byte_tokenizer)
    assert labels_of(windows, byte_tokenizer) == "uhi;ayes;"


def test_nothing_predicts_the_first_token_of_an_example(data, byte_tokenizer, monkeypatch):
    template = "{% for m in messages if m.role == 'assistant' %}{{ m.content }};{% endfor %}"
    monkeypatch.setattr(byte_tokenizer, "chat_template", template, raising=False)
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    windows = data([{"messages": messages}] * 2, template=ChatTemplate())(byte_tokenizer)
    assert labels_of(windows, byte_tokenizer) == "es;es;"


def test_records_without_any_label_are_an_input_error(data, byte_tokenizer):
    records = [{"question": "q" * 40, "answer": "y"}, {"question": "", "answer": ""}]
    with pytest.raises(InputError, match=r"No record can be trained on: .*1 with a prompt that fills a window"):
        data(records)(byte_tokenizer)


@pytest.mark.parametrize("record", [{"question": "a\ud83d", "answer": "b"}, {"question": "a", "answer": "\udc4d"}])
def test_half_a_character_is_an_input_error(data, byte_tokenizer, record):
    with pytest.raises(InputError, match=r"half a character, '\\ud.*after '.*a"):
        data([record])(byte_tokenizer)


def test_check_says_what_is_bound_to_fail(data, byte_tokenizer, caplog):
    with caplog.at_level(logging.INFO):
        data(ONE).check(byte_tokenizer)
    assert not caplog.records
    with pytest.raises(InputError, match="no field answer"):
        data([{"question": "a", "output": "b"}]).check(byte_tokenizer)


@pytest.mark.parametrize("changes", [{"windows": 0}, {"sequence_length": 0}])
def test_numbers_below_one_are_input_errors(data, changes):
    with pytest.raises(InputError, match="is not possible"):
        data(ONE, **changes)


def test_a_tokenizer_without_an_end_token_is_an_input_error(data, byte_tokenizer):
    endless = PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer.backend_tokenizer)
    with pytest.raises(InputError, match="no end token"):
        data(ONE)(endless)
