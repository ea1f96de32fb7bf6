import dataclasses
import errno
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import fqt_jax as fqt
from fqt_jax import checkpoints
from fqt_jax.checkpoints import (
    CheckpointError,
    latest_checkpoint,
    load_parameters,
    read_metadata,
    restore_checkpoint,
    save_checkpoint,
)
from fqt_jax.models import VGG
from fqt_jax.training import CrossEntropy, create_state, gather_on_device, make_train_step
from tests.test_training import data, equal

pytestmark = pytest.mark.usefixtures("relaxed_promotion")


def model(seed=0, *, recipe=fqt.FQT1, num_classes=3, channels=8):
    float_model = VGG(
        ((channels,), (8,)), num_classes=num_classes, in_features=1, rngs=nnx.Rngs(seed)
    )
    return float_model if recipe is None else fqt.quantize(float_model, recipe).model


def state_of(m, optimizer=None):
    return create_state(m, optimizer or optax.adam(1e-2))


def values(m):
    return jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(m, (nnx.Param, nnx.BatchStat))))


def test_training_resumes_bit_for_bit_without_compiling_again(tmp_path):
    graphdef, state = state_of(model())
    loss = CrossEntropy(num_classes=3)
    step = gather_on_device(make_train_step(graphdef, optax.adam(1e-2), loss=loss))
    key = jax.random.key(0)

    def advance(state, i):
        return step(state, data(), jnp.arange(16, dtype=jnp.int32) + i, key)[0]

    for i in range(2):
        state = advance(state, i)
    save_checkpoint(tmp_path / "step_2", state, {"epoch": 1})
    unbroken = advance(state, 2)
    resumed = restore_checkpoint(tmp_path / "step_2", state_of(model(seed=5))[1])
    resumed = advance(resumed, 2)
    assert equal(unbroken, resumed)
    assert step.jitted._cache_size() == 1
    assert read_metadata(tmp_path / "step_2")["epoch"] == 1


def test_float_and_quantized_checkpoints_interchange(tmp_path):
    source = model(1, recipe=None)
    save_checkpoint(tmp_path / "float", state_of(source)[1], {})
    target = model(2)
    assert load_parameters(tmp_path / "float", target) == []
    jax.tree.map(np.testing.assert_array_equal, values(target), values(source))
    save_checkpoint(tmp_path / "quantized", state_of(model(3))[1], {})
    load_parameters(tmp_path / "quantized", source)
    jax.tree.map(np.testing.assert_array_equal, values(source), values(model(3, recipe=None)))


def test_a_learned_scale_starts_from_the_loaded_weights(tmp_path):
    save_checkpoint(tmp_path / "float", state_of(model(1, recipe=None))[1], {})
    learned = dataclasses.replace(fqt.QAT, scale="learned")
    target = model(2, recipe=learned)
    load_parameters(tmp_path / "float", target)
    layer = target.stages[1][0].conv
    expected = fqt.weight_scale(layer.kernel[...])
    np.testing.assert_allclose(layer.scale[...], expected, rtol=1e-6)
    save_checkpoint(tmp_path / "learned", state_of(target)[1], {})
    load_parameters(tmp_path / "learned", model(4, recipe=None))  # the scale is left out


def test_a_head_of_another_size_stays_fresh_only_if_asked(tmp_path):
    save_checkpoint(tmp_path / "c", state_of(model(num_classes=5))[1], {})
    target = model(1, num_classes=3)
    head = np.asarray(target.head.kernel[...])
    with pytest.raises(CheckpointError, match=r"another model: head\.bias is float32\[5\]"):
        load_parameters(tmp_path / "c", target)
    fresh = load_parameters(tmp_path / "c", target, new_head="head")
    assert fresh == ["head.bias", "head.kernel"]
    np.testing.assert_array_equal(target.head.kernel[...], head)


def test_checkpoints_of_other_models_are_refused(tmp_path):
    save_checkpoint(tmp_path / "c", state_of(model())[1], {})
    with pytest.raises(CheckpointError, match="of another model"):
        restore_checkpoint(tmp_path / "c", state_of(model(channels=16))[1])
    with pytest.raises(CheckpointError, match="of another model"):
        load_parameters(tmp_path / "c", model(channels=16))
    with pytest.raises(CheckpointError, match="another model or optimizer"):
        restore_checkpoint(tmp_path / "c", state_of(model(), optax.sgd(0.1))[1])
    with pytest.raises(CheckpointError, match="another model or optimizer"):
        restore_checkpoint(tmp_path / "c", state_of(model(), optax.adagrad(0.1))[1])
    deeper = VGG(((8,), (8,), (8,)), num_classes=3, in_features=1, rngs=nnx.Rngs(0))
    with pytest.raises(CheckpointError, match="another model: it has no"):
        load_parameters(tmp_path / "c", deeper)
    shallower = VGG(((8,),), num_classes=3, in_features=1, rngs=nnx.Rngs(0))
    with pytest.raises(CheckpointError, match="another model: it also has"):
        load_parameters(tmp_path / "c", shallower)


def test_missing_damaged_and_foreign_folders_are_one_line_errors(tmp_path):
    with pytest.raises(CheckpointError, match="there is no checkpoint at"):
        read_metadata(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="not a checkpoint, or is damaged") as caught:
        load_parameters(tmp_path / "empty", model())
    assert "\n" not in str(caught.value)
    state = state_of(model())[1]
    save_checkpoint(tmp_path / "c", state, {})
    for file in (tmp_path / "c" / "state").rglob("*"):
        if file.is_file() and file.stat().st_size > 2000:
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(CheckpointError, match=r"is damaged: state/.* bytes of ") as caught:
        restore_checkpoint(tmp_path / "c", state)
    assert "\n" not in str(caught.value)
    (tmp_path / "c" / "sizes.json").unlink()  # as if it had been written by another program
    with pytest.raises(CheckpointError, match="is damaged") as caught:
        restore_checkpoint(tmp_path / "c", state)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_gone_is_named(tmp_path):
    state = state_of(model())[1]
    save_checkpoint(tmp_path / "c", state, {})
    (tmp_path / "c" / "metadata" / "metadata").unlink()
    with pytest.raises(CheckpointError, match=r"metadata/metadata is missing"):
        read_metadata(tmp_path / "c")
    (tmp_path / "c" / "sizes.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"is damaged: sizes\.json"):
        read_metadata(tmp_path / "c")


def test_a_checkpoint_is_never_overwritten(tmp_path):
    state = state_of(model())[1]
    save_checkpoint(tmp_path / "c", state, {})
    with pytest.raises(CheckpointError, match="exists already"):
        save_checkpoint(tmp_path / "c", state, {})


def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch):
    class Full:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

        def save(self, path, _):
            partial = pathlib.Path(f"{path}.orbax-tmp")
            partial.mkdir()
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoints, "_checkpointer", Full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        save_checkpoint(tmp_path / "c", state_of(model())[1], {})
    assert list(tmp_path.iterdir()) == []


def test_the_latest_checkpoint_is_the_one_of_the_greatest_step(tmp_path):
    assert latest_checkpoint(tmp_path / "none") is None
    for name in ("step_9", "step_00000010", "step_x", "other", "step_11.orbax-checkpoint-tmp"):
        (tmp_path / name).mkdir()
    assert latest_checkpoint(tmp_path) == tmp_path / "step_00000010"
