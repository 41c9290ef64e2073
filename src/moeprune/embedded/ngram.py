"""Unigram and bigram baselines: what a language model must beat to know more than which tokens are frequent.

Axis letters: T tokens, V vocabulary, N windows, W tokens of a window.
"""

import numpy as np


def unigram_V(tokens_T: np.ndarray, vocab_size: int) -> np.ndarray:
    """Add-one unigram ``p(w) = (c(w) + 1) / (T + V)``; float64 [V]."""
    return (np.bincount(tokens_T, minlength=vocab_size) + 1.0) / (len(tokens_T) + vocab_size)


def bigram_VV(tokens_T: np.ndarray, vocab_size: int) -> np.ndarray:
    """Bigram interpolated with the add-one unigram; float64 [V, V], the row is the previous token v.

    ``p(w | v) = (c(v, w) + d(v) p(w)) / (c(v) + d(v))`` where d(v) counts the distinct tokens seen after v
    (Witten and Bell 1991, method C); ``p(w | v) = p(w)`` where nothing was seen after v.
    """
    pairs = tokens_T[:-1].astype(np.int64) * vocab_size + tokens_T[1:]
    count_VV = np.bincount(pairs, minlength=vocab_size**2).reshape(vocab_size, vocab_size)
    distinct_V1 = np.count_nonzero(count_VV, axis=1, keepdims=True)
    total_V1 = count_VV.sum(axis=1, keepdims=True)
    prior_weight_V1 = np.where(total_V1 > 0, distinct_V1, 1)
    return (count_VV + prior_weight_V1 * unigram_V(tokens_T, vocab_size)) / (total_V1 + prior_weight_V1)


def unigram_perplexity(probability_V: np.ndarray, windows_NW: np.ndarray) -> float:
    """``exp(-mean log p(w))`` over all tokens but each window's first."""
    return float(np.exp(-np.log(probability_V[windows_NW[:, 1:]]).mean()))


def bigram_perplexity(probability_VV: np.ndarray, windows_NW: np.ndarray) -> float:
    """``exp(-mean log p(w | v))`` over all tokens but each window's first; v is the token before w in its window."""
    return float(np.exp(-np.log(probability_VV[windows_NW[:, :-1], windows_NW[:, 1:]]).mean()))
