"""Flax's tree mode, which it proposes as its default: models are trees, without shared parts."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import fqt_jax as fqt
from fqt_jax.estimators import FullBatch, OneDraw
from fqt_jax.losses import CrossEntropy
from fqt_jax.models import ResNet
from fqt_jax.training import create_state, make_eval_step, make_train_step, merge_model

pytestmark = pytest.mark.skipif(
    not hasattr(nnx, "set_graph_mode"), reason="this Flax has no tree mode"
)


def _trained(graph, estimator):
    """The model's arrays after two steps, and what its evaluation finds."""
    with nnx.set_graph_mode(graph):
        model = ResNet((1, 1), num_classes=3, width=0.125, rngs=nnx.Rngs(0))
        model, _ = fqt.quantize(model, fqt.FQT1)
        optimizer, loss = optax.sgd(0.1), CrossEntropy(num_classes=3)
        graphdef, state = create_state(model, optimizer)
        step = make_train_step(graphdef, optimizer, loss=loss, estimator=estimator)
        images = jax.random.normal(jax.random.key(0), (8, 8, 8, 3))
        batch = {"x": images, "label": jnp.arange(8, dtype=jnp.int32) % 3}
        for _ in range(2):
            state, _ = step(state, batch, jax.random.key(1))
        sums = make_eval_step(graphdef, loss=loss)(state, None, batch)
        kinds = (nnx.Param, nnx.BatchStat, nnx.RngCount)
        trained = nnx.to_pure_dict(nnx.state(merge_model(graphdef, state), kinds))
        return jax.tree.map(np.asarray, (trained, sums.means()))


@pytest.mark.parametrize(
    "estimator", [pytest.param(FullBatch(), marks=pytest.mark.slow), OneDraw()]
)
def test_trains_to_the_same_bits_in_tree_mode(estimator):
    graph, tree = _trained(True, estimator), _trained(False, estimator)
    jax.tree.map(np.testing.assert_array_equal, graph, tree)
