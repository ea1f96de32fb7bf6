"""Text that every Python carries: the help of its language reference, as sequences of characters.

What ``help("topics")`` lists is in ``pydoc_data.topics``, some 500,000 characters. Each version of
Python has its own, so figures on it compare within one version.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pydoc_data import topics

import numpy as np
import numpy.typing as npt

from experiments.data.dataset import DataError, Dataset
from experiments.data.splits import TEST_SEED, content_key, content_keys

NAMES = ("pydoc",)
"""Names of data sets of text."""

CHARACTERS = "\n" + "".join(map(chr, range(32, 127)))
"""What has a token of its own; all else shares the last token."""

NUM_CLASSES = len(CHARACTERS) + 1
LENGTH = 128
"""Characters in a sequence."""

_TEST_FRACTION = 0.1


@dataclasses.dataclass(frozen=True, eq=False)
class Sequences:
    """Sequences of tokens, and for each token the one after it.

    Args:
      tokens: uint8 ``[N, T]``, N at least 1.
      labels: int32 ``[N, T]``.

    Raises:
      DataError: there are no sequences, or shapes differ.
    """

    tokens: np.ndarray
    labels: np.ndarray

    def __post_init__(self) -> None:
        if self.tokens.ndim != 2 or self.tokens.shape != self.labels.shape:
            raise DataError(
                f"tokens and labels must be [N, T]; got {list(self.tokens.shape)} and "
                f"{list(self.labels.shape)}."
            )
        if not self.tokens.size:
            raise DataError("a split is empty: it has no sequence.")

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def shape(self) -> tuple[int, ...]:
        """The number of tokens in every sequence, alone."""
        return self.tokens.shape[1:]

    def first(self, count: int) -> np.ndarray:
        """The first sequences, at most ``count``: a fair sample."""
        return self.tokens[:count]


def encode(text: str) -> np.ndarray:
    """The tokens of a text, ``uint8[N]``.

    Example:
      >>> encode("a\\n ä").tolist(), NUM_CLASSES
      ([66, 0, 1, 96], 97)
    """
    other = NUM_CLASSES - 1
    known = np.full(128, other, np.uint8)
    known[[ord(character) for character in CHARACTERS]] = np.arange(other)
    codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    return known[np.minimum(codes, 127)]


def decode(tokens: npt.ArrayLike) -> str:
    """The text of tokens, ``[N]``; a � stands for the token that many characters share.

    Example:
      >>> decode(encode("if x:\\n    ä"))
      'if x:\\n    �'
    """
    characters = (*CHARACTERS, "\N{REPLACEMENT CHARACTER}")
    return "".join(characters[token] for token in np.asarray(tokens))


def load_text(name: str, *, validation_fraction: float, seed: int, limit: int | None) -> Dataset:
    """Loads a data set of text; see :func:`experiments.data.load`.

    Topics are dealt out whole, by a hash of their text: those that fit in a tenth of all text are
    the test split, whatever the seed, and of the rest those that fit in ``validation_fraction`` are
    held out. Those of a split are joined and cut into sequences.

    Raises:
      DataError: a split would be empty.
    """
    test, rest = split_topics(topics.topics, _TEST_FRACTION, TEST_SEED)
    validation, train = split_topics(rest, validation_fraction, seed)
    splits: dict[str, Sequences] = {}
    for field, texts in {"train": train, "validation": validation, "test": test}.items():
        tokens = encode("\n".join(texts.values()))
        count = max(0, len(tokens) - 1) // LENGTH
        if not count:
            raise DataError(
                f"{name}: validation_fraction={validation_fraction} leaves no sequence of {LENGTH} "
                f"characters for the {field} split."
            )
        inputs, labels = (
            tokens[start : start + count * LENGTH].reshape(count, LENGTH) for start in (0, 1)
        )
        order = np.argsort(content_keys(map(bytes, inputs), seed), kind="stable")[:limit]
        splits[field] = Sequences(inputs[order], labels[order].astype(np.int32))
    return Dataset(
        name=name,
        train=splits["train"],
        validation=splits["validation"],
        test=splits["test"],
        num_classes=NUM_CLASSES,
        class_names=(*CHARACTERS, "other"),
    )


def split_topics(
    texts: Mapping[str, str], fraction: float, seed: int
) -> tuple[dict[str, str], dict[str, str]]:
    """The topics that are held out, and the rest, in an order of their own.

    In the order of their hashes, each topic is held out that still fits in the fraction.

    Example:
      >>> held, rest = split_topics({"a": "12345", "b": "1234567890", "c": "123"}, 0.5, seed=0)
      >>> sum(map(len, held.values())) <= 9, sorted({**held, **rest})
      (True, ['a', 'b', 'c'])
    """
    budget = fraction * sum(map(len, texts.values()))
    held: dict[str, str] = {}
    rest: dict[str, str] = {}
    for name in sorted(texts, key=lambda name: content_key(texts[name].encode(), seed)):
        fits = len(texts[name]) <= budget
        budget -= len(texts[name]) if fits else 0
        (held if fits else rest)[name] = texts[name]
    return held, rest
