import dataclasses
import errno
import hashlib
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import fqt_jax as fqt
from fqt_jax import array_files, checkpoints, checksums
from fqt_jax.checkpoints import (
    CheckpointError,
    latest_checkpoint,
    list_checkpoints,
    load_parameters,
    nonfinite_arrays,
    read_metadata,
    restore_checkpoint,
    save_checkpoint,
    verify_checkpoint,
)
from fqt_jax.models import VGG
from fqt_jax.training import (
    CrossEntropy,
    Metrics,
    TrainState,
    create_state,
    gather_on_device,
    make_train_step,
)
from tests.test_training import data, equal

pytestmark = pytest.mark.usefixtures("relaxed_promotion")

ROOT = pathlib.Path(__file__).parents[1]


def model(seed=0, *, recipe=fqt.FQT1, num_classes=3, channels=8):
    float_model = VGG(
        ((channels,), (8,)), num_classes=num_classes, in_features=1, rngs=nnx.Rngs(seed)
    )
    return float_model if recipe is None else fqt.quantize(float_model, recipe).model


def state_of(m, optimizer=None):
    return create_state(m, optimizer or optax.adam(1e-2))


def numbers(step):
    """A small state that takes no time to make."""
    params = {"head": {"kernel": jnp.full((3, 4), step, jnp.float32)}}
    return TrainState(params, {}, {}, jnp.int32(step), Metrics.zero())


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
    layer = target.features.layers[4]
    expected = fqt.weight_scale(layer.kernel[...])
    np.testing.assert_allclose(layer.scale[...], expected, rtol=1e-6)
    save_checkpoint(tmp_path / "learned", state_of(target)[1], {})
    load_parameters(tmp_path / "learned", model(4, recipe=None))  # the scale is left out
    from_one = dataclasses.replace(fqt.QAT, scale="learned_from_one")
    other = model(5, recipe=from_one)
    load_parameters(tmp_path / "float", other)
    np.testing.assert_array_equal(other.features.layers[4].scale[...], np.ones_like(expected))
    load_parameters(tmp_path / "learned", other)  # what was learned is what counts
    np.testing.assert_array_equal(other.features.layers[4].scale[...], layer.scale[...])


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


def test_missing_and_foreign_folders_are_one_line_errors(tmp_path):
    with pytest.raises(CheckpointError, match="there is no checkpoint at"):
        read_metadata(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="not a checkpoint, or is damaged: it has no SHA256"):
        load_parameters(tmp_path / "empty", model())
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "metadata.json").write_text('{"format": 7}')
    checksums.seal(foreign)
    with pytest.raises(CheckpointError, match="has the format 7; this version reads 2"):
        load_parameters(foreign, model())
    (foreign / "metadata.json").write_text(f'{{"format": {checkpoints._FORMAT}}}')
    checksums.seal(foreign)
    with pytest.raises(CheckpointError, match="cannot be read") as caught:
        load_parameters(foreign, model())
    assert "\n" not in str(caught.value)


READERS = {
    "verify": verify_checkpoint,
    "metadata": read_metadata,
    "restore": lambda path: restore_checkpoint(path, numbers(0)),
    "load": lambda path: load_parameters(path, model()),
}


@pytest.mark.parametrize("read", READERS.values(), ids=READERS.keys())
def test_files_that_are_missing_changed_or_added_are_named_by_every_read(tmp_path, read):
    path = tmp_path / "c"
    save_checkpoint(path, numbers(1), {})
    data = (path / "metadata.json").read_bytes()

    def message() -> str:
        with pytest.raises(CheckpointError) as caught:
            read(path)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    (path / "metadata.json").write_bytes(data.replace(b":", b";"))
    assert message() == f"the checkpoint {path} is damaged: changed: metadata.json."
    (path / "metadata.json").unlink()
    (path / "state" / "new").touch()
    assert message() == (
        f"the checkpoint {path} is damaged: missing: metadata.json; not part of it: state/new."
    )
    (path / "metadata.json").write_bytes(data)
    (path / "state" / "new").unlink()
    verify_checkpoint(path)
    (path / "SHA256SUMS").unlink()
    assert "it has no SHA256SUMS" in message()


def test_a_flipped_bit_anywhere_is_found_and_its_file_named(tmp_path):
    path = tmp_path / "c"
    save_checkpoint(path, numbers(1), {"history": [{"loss": 0.25}]})
    rng = np.random.default_rng(0)
    files = [file for file in path.rglob("*") if file.is_file()]
    assert len(files) > 5
    for file in files:
        whole = file.read_bytes()
        bits = 8 * len(whole)
        for bit in {0, bits - 1, *rng.choice(bits, min(bits, 30), replace=False).tolist()}:
            flipped = bytearray(whole)
            flipped[bit // 8] ^= 1 << bit % 8
            file.write_bytes(flipped)
            with pytest.raises(CheckpointError, match=f"changed: {file.relative_to(path)}"):
                verify_checkpoint(path)
        for cut in (0, len(whole) // 2, len(whole) - 1):
            file.write_bytes(whole[:cut])
            with pytest.raises(CheckpointError, match=f"changed: {file.relative_to(path)}"):
                verify_checkpoint(path)
        file.write_bytes(whole)
    verify_checkpoint(path)


def test_the_checksums_are_those_of_sha256sum(tmp_path):
    save_checkpoint(tmp_path / "c", numbers(1), {})
    *lines, last = (tmp_path / "c" / "SHA256SUMS").read_text().splitlines(keepends=True)
    listed = {}
    for line in lines:
        digest, name = line.rstrip("\n").split("  ")
        listed[name] = digest
        assert hashlib.sha256((tmp_path / "c" / name).read_bytes()).hexdigest() == digest
    assert {"metadata.json", "state/_METADATA"} < listed.keys()
    assert last == f"# {hashlib.sha256(''.join(lines).encode()).hexdigest()}\n"


def test_a_checkpoint_is_never_overwritten(tmp_path):
    save_checkpoint(tmp_path / "c", numbers(1), {})
    with pytest.raises(CheckpointError, match="exists already"):
        save_checkpoint(tmp_path / "c", numbers(2), {})
    assert int(restore_checkpoint(tmp_path / "c", numbers(0)).step) == 1


@pytest.mark.parametrize("change", ["merge", "value", "name", "type"])
def test_what_is_not_read_back_as_it_was_is_no_checkpoint(tmp_path, monkeypatch, change):
    if change == "merge":  # of Orbax's files, which finds none without an error
        monkeypatch.setattr(ocp.PyTreeCheckpointHandler, "finalize", lambda *_: None)
    else:
        read = array_files.read_arrays

        def changed(folder):
            arrays = read(folder)
            value = arrays.pop("step")
            return (
                arrays
                | {
                    "value": {"step": value + 1},
                    "name": {"steps": value},
                    "type": {"step": value.view(np.uint32)},
                }[change]
            )

        monkeypatch.setattr(array_files, "read_arrays", changed)
    with pytest.raises(CheckpointError, match="c: what was written cannot be read back"):
        save_checkpoint(tmp_path / "c", numbers(1), {})
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_written_leaves_nothing_behind(tmp_path):
    with pytest.raises(CheckpointError, match=r"TypeError: .*set is not JSON serializable"):
        save_checkpoint(tmp_path / "c", numbers(1), {"x": {1}})
    assert list(tmp_path.iterdir()) == []


FULL = """
import gc, pathlib, resource, sys
import numpy as np
from fqt_jax.checkpoints import CheckpointError, save_checkpoint
from fqt_jax.training import Metrics, TrainState

folder = pathlib.Path(sys.argv[1])
rng = np.random.default_rng(0)
params = {f"l{i}": {"kernel": rng.normal(size=(128, 64)).astype(np.float32)} for i in range(30)}
zero = np.int32(0)
state = TrainState(params, {}, {}, zero, Metrics.zero())
save_checkpoint(folder / "good", state, {})
for limit in (0, 1_000, 20_000, 30_000) * 4:  # an array takes 32,768
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        save_checkpoint(folder / "new", state, {})
    except CheckpointError as error:
        print(error)
    gc.collect()
"""


def test_a_disk_that_takes_no_more_gives_one_line_and_keeps_what_there_was(tmp_path):
    """A limit on a file's length stands for the full disk: both fail in Orbax's own threads."""
    result = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    assert result.stderr == ""
    line = f"cannot write the checkpoint {tmp_path / 'new'}: {os.strerror(errno.EFBIG)}\n"
    assert result.stdout == 16 * line
    assert [path.name for path in tmp_path.iterdir()] == ["good"]
    verify_checkpoint(tmp_path / "good")


def test_arrays_that_are_not_finite_are_named():
    _, state = state_of(model())
    assert nonfinite_arrays(state) == []
    moments = jax.tree.map(
        lambda x: jnp.full_like(x, jnp.inf) if x.shape == (3,) else x, state.opt_state
    )
    broken = dataclasses.replace(
        state,
        opt_state=moments,
        metrics=dataclasses.replace(state.metrics, sums={"loss": jnp.float32(jnp.nan)}),
    )
    assert nonfinite_arrays(broken) == [
        "opt_state.0.mu.head.bias",
        "opt_state.0.nu.head.bias",
        "metrics.sums.loss",
    ]
    others = jax.tree.map(
        lambda x: x * jnp.nan if jnp.issubdtype(x.dtype, jnp.floating) else x, state.others
    )
    wrong = nonfinite_arrays(dataclasses.replace(state, others=others))
    assert wrong
    assert all(name.startswith("others.") for name in wrong)


def test_checkpoints_are_listed_from_the_greatest_step_on(tmp_path):
    assert latest_checkpoint(tmp_path / "none") is None
    for name in (
        "step_9",
        "step_00000010",
        "step_x",
        "other",
        "step_11.partial",
        "step_12.removed",
    ):
        (tmp_path / name).mkdir()
    assert latest_checkpoint(tmp_path) == tmp_path / "step_00000010"
    assert list_checkpoints(tmp_path) == [tmp_path / "step_00000010", tmp_path / "step_9"]
    (tmp_path / "file").touch()
    assert latest_checkpoint(tmp_path / "file") is None
