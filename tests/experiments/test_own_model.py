"""What fusion is worth in a model of one's own."""

import functools

import pytest

from experiments.bench import own_model
from experiments.bench.own_model import FORMS, OwnModelConfig, measure
from experiments.cli import UserError
from fqt_jax.models import VGG

pytestmark = pytest.mark.usefixtures("relaxed_promotion")


@pytest.mark.slow
def test_a_plain_sequence_needs_no_more_memory_than_the_librarys_model(monkeypatch):
    # Two convolutions in place of six: most of the test is compilation.
    stages = ((32,), (64,))
    monkeypatch.setattr(own_model, "_CHANNELS", stages)
    monkeypatch.setattr(own_model, "VGGSmall", functools.partial(VGG, stages))
    found = measure(OwnModelConfig(batch_size=4, image_size=16, repeats=1))
    assert list(found) == list(FORMS)
    own, sequence, in_turn = (memory for _, memory in found.values())
    assert sequence <= 1.1 * own
    assert in_turn > 2 * own


def test_bad_numbers_are_named():
    with pytest.raises(UserError, match="image_size must be at least 8; got 4"):
        OwnModelConfig(image_size=4)
