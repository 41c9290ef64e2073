"""Unigram and bigram baselines against hand computations."""

import math

import numpy as np
import pytest

from moeprune.embedded.ngram import bigram_perplexity, bigram_VV, unigram_perplexity, unigram_V

# Token 3 of the vocabulary of 4 never occurs, and nothing follows token 2.
TOKENS = np.array([0, 1, 0, 1, 0, 0, 2], dtype=np.int32)


def test_unigram_adds_one():
    assert unigram_V(TOKENS, 4) == pytest.approx(np.array([5, 3, 2, 1]) / 11)


def test_bigram_interpolates_with_the_unigram():
    unigram = np.array([5, 3, 2, 1]) / 11
    # After 0 come 1, 1, 0, 2: four tokens, three of them distinct. After 1 comes 0, twice.
    after_0 = (np.array([1, 2, 1, 0]) + 3 * unigram) / 7
    after_1 = (np.array([2, 0, 0, 0]) + 1 * unigram) / 3
    assert bigram_VV(TOKENS, 4) == pytest.approx(np.array([after_0, after_1, unigram, unigram]))


def test_probabilities_sum_to_one_and_none_is_zero():
    tokens = np.random.default_rng(0).zipf(1.5, size=5000) % 50
    unigram, bigram = unigram_V(tokens, 60), bigram_VV(tokens, 60)
    assert unigram.sum() == pytest.approx(1)
    assert bigram.sum(axis=1) == pytest.approx(np.ones(60))
    assert min(unigram.min(), bigram.min()) > 0


def test_perplexity_skips_the_first_token_of_each_window():
    windows = np.array([[2, 0, 1], [3, 1, 0]])
    unigram = unigram_V(TOKENS, 4)
    expected = math.exp(-(2 * math.log(5 / 11) + 2 * math.log(3 / 11)) / 4)
    assert unigram_perplexity(unigram, windows) == pytest.approx(expected)
    bigram = bigram_VV(TOKENS, 4)
    product = unigram[0] * bigram[0, 1] * unigram[1] * bigram[1, 0]
    assert bigram_perplexity(bigram, windows) == pytest.approx(product ** (-1 / 4))


def test_a_uniform_model_has_the_perplexity_of_its_vocabulary():
    windows = np.random.default_rng(1).integers(0, 8, size=(5, 16))
    assert unigram_perplexity(np.full(8, 1 / 8), windows) == pytest.approx(8)
    assert bigram_perplexity(np.full((8, 8), 1 / 8), windows) == pytest.approx(8)
