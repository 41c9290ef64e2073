"""Three multiple-choice tasks built from held-out text; all choices of an item have equally many tokens.

Equal lengths make summed log-likelihoods comparable and keep an untrained model at chance. No item's text occurs in the
training text, and the position of the right answer is uniformly random.
"""

import json
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

from transformers import PreTrainedTokenizerFast

from moeprune.embedded.corpus import DOMAINS, task_lines, training_text
from moeprune.errors import InputError

Value = TypeVar("Value")

SENTENCE_DOMAINS = ("prose", "scripture", "speeches")
ITEMS_PER_DOMAIN = 400
CHANCE_OF_TASK = {"word_order": 1 / 2, "cloze": 1 / 4, "copy": 1 / 4}

WORD_ORDER_WORDS = range(8, 21)
CLOZE_WORDS = range(8, 26)
COPY_WORDS = range(12, 26)

# A lower-case word of at least three letters that stands alone: after a space, before a space or punctuation.
PLAIN_WORD = re.compile(r"(?<= )[a-z]{3,}(?=[ ,;:.?!])")
CLOZE_LETTERS = 4
CLOZE_RAREST_COUNT = 20
CLOZE_FREQUENCY_FACTOR = 1.5

# Quotation marks, brackets, dashes and ends of clauses; a dot after a title ends nothing.
_CLAUSE_BREAK = re.compile(r'\s*(?:["“”_()\[\]]|--|—)\s*|(?<=[.?!:;])(?<!Mr\.)(?<!Mrs\.)(?<!Dr\.)(?<!St\.)\s+')
_CLAUSE = re.compile(r"[A-Za-z][A-Za-z,'\- ]*[A-Za-z][.?!:;]")


@dataclass(frozen=True)
class Question:
    """What precedes the choices, the choices with the right one first, and the held-out text that no model has seen.

    ``held_out`` leaves out a closing mark, so that the same words inside a longer sentence count as seen.
    """

    context: str
    choices: tuple[str, ...]
    held_out: str


@dataclass(frozen=True)
class Item:
    """One line of a task file; ``answer`` is the position of the right choice."""

    context: str
    choices: tuple[str, ...]
    answer: int
    domain: str


def write_tasks(folder: Path, tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> None:
    """Write ``word_order.jsonl``, ``cloze.jsonl`` and ``copy.jsonl``, 400 items of each domain in a mixed order.

    The same files for the same seed and tokenizer. Raises InputError when the held-out text does not suffice.
    """
    training_bytes = "\n".join(training_text(domain) for domain in DOMAINS).encode()
    token_count = TokenCount(tokenizer)
    for task, questions_of in QUESTIONS_OF_TASK.items():
        items = []
        for domain in SENTENCE_DOMAINS:
            rng = random.Random(f"{task} {domain} {seed}")
            fair = (question for question in questions_of(domain, token_count, rng) if token_count.is_fair(question))
            unseen = (question for question in fair if question.held_out.encode() not in training_bytes)
            items.extend(_first_items(unseen, domain, rng))
        random.Random(f"{task} {seed}").shuffle(items)
        lines = [json.dumps(asdict(item), ensure_ascii=False) + "\n" for item in items]
        (folder / f"{task}.jsonl").write_text("".join(lines), encoding="utf-8")


def _first_items(questions: Iterator[Question], domain: str, rng: random.Random) -> list[Item]:
    items = []
    for question in questions:
        choices = rng.sample(question.choices, len(question.choices))
        items.append(Item(question.context, tuple(choices), choices.index(question.choices[0]), domain))
        if len(items) == ITEMS_PER_DOMAIN:
            return items
    raise InputError(
        f"The held-out text of {domain!r} gives {len(items)} items, fewer than {ITEMS_PER_DOMAIN}.",
        change="Lower ITEMS_PER_DOMAIN.",
    )


class TokenCount:
    """Counts tokens as a harness does that encodes context and choice together and splits after the context."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer.backend_tokenizer

    def __call__(self, text: str) -> int:
        return len(self._ids(text))

    def is_fair(self, question: Question) -> bool:
        """Whether all choices have equally many tokens and none merges with the end of the context."""
        context = self._ids(question.context)
        whole = [self._ids(question.context + choice) for choice in question.choices]
        return len({len(ids) for ids in whole}) == 1 and all(ids[: len(context)] == context for ids in whole)

    def _ids(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids


def word_order_questions(domain: str, _token_count: TokenCount, rng: random.Random) -> Iterator[Question]:
    """A clause without its closing mark, against the same with two neighbouring inner words exchanged, after nothing.

    Shuffling all words is too easy: a briefly trained model already has 99.5% right. Without the mark, no choice is the
    same token sequence as one of cloze, which a harness that caches by whole sequences may confuse.
    """
    for clause in _shuffled(clauses(task_lines(domain), WORD_ORDER_WORDS), rng):
        right = clause[:-1]
        words = right.split(" ")
        at = rng.randrange(1, len(words) - 2)
        exchanged = " ".join([*words[:at], words[at + 1], words[at], *words[at + 2 :]])
        if exchanged != right:
            yield Question("", (right, exchanged), right)


def cloze_questions(domain: str, token_count: TokenCount, rng: random.Random) -> Iterator[Question]:
    """After the start of a clause: its next word and the rest, against three equally frequent words and the rest."""
    substitutes = Substitutes(training_text(domain), token_count)
    for clause in _shuffled(clauses(task_lines(domain), CLOZE_WORDS), rng):
        for word in _shuffled(PLAIN_WORD.finditer(clause), rng):
            possible = substitutes.of(word.group())
            if len(possible) >= 3:
                words = [word.group(), *rng.sample(possible, 3)]
                context, rest = clause[: word.start() - 1], clause[word.end() :]
                yield Question(context, tuple(f" {other}{rest}" for other in words), clause[:-1])
                break


def copy_questions(domain: str, token_count: TokenCount, rng: random.Random) -> Iterator[Question]:
    """After a passage, a line break and its first quarter to half again: the next word, against three others of it.

    All four are plain words that the context holds equally often, so neither form nor frequency gives the answer away.
    """
    for passage in _shuffled(passages(task_lines(domain), COPY_WORDS, rng), rng):
        words = passage.split(" ")
        plain = sorted(set(PLAIN_WORD.findall(f" {passage} ")))
        for position in _shuffled(range(len(words) // 4, len(words) // 2), rng):
            answer = words[position]
            seen = words + words[:position]
            alike = [word for word in plain if _same_length_and_count(word, answer, seen, token_count)]
            if answer in plain and len(alike) > 3:
                alike.remove(answer)
                context = f"{passage}\n{' '.join(words[:position])}"
                choices = tuple(f" {word}" for word in [answer, *rng.sample(alike, 3)])
                yield Question(context, choices, passage)
                break


def _same_length_and_count(word: str, other: str, seen: list[str], token_count: TokenCount) -> bool:
    bare = [text.rstrip(",;:.?!") for text in seen]
    return bare.count(word) == bare.count(other) and token_count(f" {word}") == token_count(f" {other}")


QUESTIONS_OF_TASK = {"word_order": word_order_questions, "cloze": cloze_questions, "copy": copy_questions}


class Substitutes:
    """Plain words of a training text that may stand for another: as many tokens, and nearly as frequent."""

    def __init__(self, text: str, token_count: TokenCount) -> None:
        counts = Counter(word for word in PLAIN_WORD.findall(text) if len(word) >= CLOZE_LETTERS)
        self._count = {word: count for word, count in sorted(counts.items()) if count >= CLOZE_RAREST_COUNT}
        self._tokens = {word: token_count(f" {word}") for word in self._count}

    def of(self, word: str) -> list[str]:
        """Words whose count is within a factor of 1.5 of the word's; none for a word that is too short or too rare."""
        if word not in self._count:
            return []
        least, most = self._count[word] / CLOZE_FREQUENCY_FACTOR, self._count[word] * CLOZE_FREQUENCY_FACTOR
        return [
            other
            for other, count in self._count.items()
            if least <= count <= most and self._tokens[other] == self._tokens[word] and other != word
        ]


def clauses(lines: Iterable[str], word_counts: range) -> list[str]:
    """Sentences, and parts of them up to a colon or semicolon, that hold no other marks than commas; each once."""
    parts = (part for line in lines for part in _CLAUSE_BREAK.split(line))
    kept = (part for part in parts if _CLAUSE.fullmatch(part) and "  " not in part)
    return list(dict.fromkeys(part for part in kept if len(part.split()) in word_counts))


def passages(lines: Iterable[str], word_counts: range, rng: random.Random) -> list[str]:
    """The lines cut into runs of words of random length; what is too short or not evenly spaced is left out."""
    runs = []
    for line in lines:
        words = line.split(" ")
        while words:
            count = rng.choice(word_counts)
            runs.append(words[:count])
            words = words[count:]
    return list(dict.fromkeys(" ".join(run) for run in runs if len(run) in word_counts and all(run)))


def _shuffled(values: Iterable[Value], rng: random.Random) -> list[Value]:
    values = list(values)
    return rng.sample(values, len(values))
