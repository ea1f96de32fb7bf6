import functools
import json
import math
import pathlib
import sys

import jax
import numpy as np
import pytest
from flax import nnx

from experiments import speed
from experiments.bench import layers as speed_layers
from experiments.bench import machine
from experiments.bench import report as speed_report
from experiments.bench.contenders import (
    PHASES,
    SPEED_RECIPES,
    JaxContender,
    Roster,
    Setting,
    kept_fractions,
    layers_of,
    resolve_implementations,
    step_products,
)
from experiments.bench.measure import measure
from experiments.bench.steps import compare, measure_rss, measure_steps, summarize
from experiments.cli import UserError
from experiments.runs.config import RunConfig
from experiments.sweeps.specs import parse
from fqt_jax.kernels.contract import UnsupportedError
from fqt_jax.models import MODELS, VGG
from fqt_jax.recipe import FQT1, FULL_PRECISION

TINY = Setting("vgg_small", 0.125, 4, 8)


pytestmark = pytest.mark.usefixtures("relaxed_promotion")


@pytest.fixture(autouse=True)
def _small_dot(monkeypatch):
    monkeypatch.setattr(machine, "dot_rate", lambda: 50.0)


class Fake:
    """A contender that counts its runs."""

    def __init__(self, name: str, phases=PHASES[:3]):
        self.name, self.ran, self._phases = name, [], phases

    def build(self, setting):
        self.ran.append("build")

    def train(self, steps):
        self.ran += ["total"] * steps

    def phases(self):
        return {p: lambda p=p: self.ran.append(p) for p in self._phases}

    def details(self):
        return {"products": 1000, "memory": None}


def without_pauses(monkeypatch):
    for seconds in ("_SETTLE", "_BURST", "_TURN"):
        monkeypatch.setattr(f"experiments.bench.steps.{seconds}", 0.0)


def test_contenders_take_turns_and_a_missing_phase_is_left_out(monkeypatch):
    without_pauses(monkeypatch)
    whole, bare = Fake("jax"), Fake("other", ())
    result = measure_steps(TINY, [whole, bare], warmup=2, repeats=3)
    assert whole.ran[0] == "build"
    assert [whole.ran.count(phase) for phase in PHASES] == [8, 8, 8, 9]  # and the first step
    assert bare.ran == ["build"] + ["total"] * 9
    assert set(result["contenders"]["jax"]["phases"]) == set(PHASES)
    assert set(result["contenders"]["other"]["phases"]) == {"total"}
    assert all(of_one["first"] > 0 for of_one in result["contenders"].values())
    (whole_steps,) = measure_steps(TINY, [whole], warmup=1, repeats=1, phases=["total"])[
        "contenders"
    ].values()
    assert set(whole_steps["phases"]) == {"total"}
    assert len(result["contenders"]["jax"]["phases"]["total"]["samples"]) == 3
    report = {"runs": [run_of(result)], "layers": [], "check": []}
    assert "other" in speed_report.tables(report, TINY)


def run_of(result):
    result = {"left_out": ["nothing"]} | {k: v for k, v in result.items() if k != "left_out"}
    return {"threads": 2, "machine": machine.describe(), **result}


def test_a_contender_whose_kernels_decline_is_left_out_with_the_reason(monkeypatch):
    without_pauses(monkeypatch)

    def decline(steps):
        raise UnsupportedError("no implementation serves this product")

    declining = Fake("qat/native")
    declining.train = decline
    result = measure_steps(TINY, [Fake("jax"), declining], warmup=1, repeats=1)
    assert set(result["contenders"]) == {"jax"}
    assert result["left_out"] == ["qat/native is left out: no implementation serves this product"]
    with pytest.raises(UserError, match="qat/native is left out"):
        measure_steps(TINY, [declining], warmup=1, repeats=1)


def test_ratios_follow_from_the_medians():
    def result(*samples):
        return {"phases": {"total": summarize(samples)}, "products": 6_000_000_000}

    results = {"torch": result(90, 100, 500), "jax": result(400, 300), "fqt1/xla": result(20, 20)}
    compare(results, batch_size=128, dot_rate=600.0)
    mine = results["fqt1/xla"]
    assert mine["speedup"] == {"torch": 5.0, "jax": 17.5, "float": 5.0}
    assert mine["samples_per_second"] == pytest.approx(6400)
    assert mine["rate"] == pytest.approx(300)
    assert mine["share_of_peak"] == pytest.approx(0.5)
    assert results["torch"]["speedup"]["torch"] == 1.0
    alone = {"qat/xla": result(10)}
    compare(alone, batch_size=1, dot_rate=1.0)
    assert alone["qat/xla"]["speedup"] == {}


@pytest.mark.usefixtures("tiny_vgg")
@pytest.mark.slow
def test_a_jax_contender_steps_and_its_parts_change_what_they_should():
    contender = JaxContender("fqt1/xla", FQT1, "xla")
    contender.build(TINY)
    before = params(contender)
    contender.train(1)
    after = params(contender)
    assert any((a != b).any() for a, b in zip(before, after, strict=True))
    parts = contender.phases()
    parts["forward"]()
    parts["forward_backward"]()
    same = params(contender)
    assert all((a == b).all() for a, b in zip(after, same, strict=True))
    assert any(np.abs(g).max() > 0 for g in jax.tree.leaves(contender._grads))
    parts["update"]()
    assert any((a != b).any() for a, b in zip(same, params(contender), strict=True))
    details = contender.details()
    assert details["memory"]["temp"] > 0
    json.dumps(details)


@pytest.mark.parametrize("name", SPEED_RECIPES)
def test_a_variant_is_what_a_sweep_calls_it(name):
    variant = SPEED_RECIPES[name]
    run = RunConfig(**parse("recipe", variant.spec).options)
    assert run.build_recipe() == variant.recipe
    assert run.build_estimator() == variant.estimator
    assert (run.budget or "layer") == variant.budget


def test_a_contender_shares_out_its_bits(monkeypatch):
    monkeypatch.setitem(MODELS, "vgg_small", functools.partial(VGG, ((8,), (8,), (8,))))
    names = ("fqt1", "fqt1_budget")
    products = []
    for contender in Roster(names, ["xla"], [f"{name}/xla" for name in names]).contenders:
        contender.build(Setting("vgg_small", 0.125, 32, 16))
        products.append(contender._products)
    assert products[0] != products[1]


def params(contender):
    return [np.array(x) for x in jax.tree.leaves(contender._state.params)]


def test_peak_memory_covers_the_steps():
    result = measure_rss(TINY, Fake("fake"))
    assert 0 < result["before"] <= result["building"]
    assert result["steps"] is None or result["steps"] > 0


def test_layer_shapes_and_products_of_a_step():
    layers = layers_of(Setting("resnet18", 0.125, 4, 16))
    first = ["stem/layers/0", "blocks/0/body/layers/1", "blocks/0/body/layers/4"]
    assert [x.path for x in layers[:3]] == first
    assert layers[-1].path == "head"
    strided = next(x for x in layers if x.path == "blocks/2/body/layers/1")
    assert (strided.input, strided.output) == ((4, 16, 16, 8), (4, 8, 8, 16))
    assert strided.products == 4 * 8 * 8 * 16 * 9 * 8
    assert kept_fractions(strided, FQT1) == (0.25, 0.25)
    assert kept_fractions(strided, FULL_PRECISION) == (1.0, 1.0)
    first, second = layers[:2]
    assert step_products(layers[:2], {}) == 2 * first.products + 3 * second.products
    mixed = step_products(layers[:2], {"blocks/0/body/layers/1": FQT1})
    assert mixed == 2 * first.products + 1.5 * second.products


def test_quantized_layers_are_counted_once_by_shape():
    found = speed_layers.quantized_layers(Setting("vgg11", 0.125, 4, 32))
    assert sum(count for _, count in found) == 7  # all but the first
    assert max(count for _, count in found) == 2


def test_dots_have_the_products_of_the_pruned_layer():
    layer = layers_of(Setting("vgg_small", 1.0, 8, 8))[1]
    work = {name: math.prod(speed_layers.dot_shape(layer, name)) for name in speed_layers.PRODUCTS}
    assert work["forward"] == layer.products
    for name in speed_layers.PRODUCTS[1:]:
        assert work[name] == layer.products / 4


def test_a_long_dot_is_timed_in_part(monkeypatch):
    monkeypatch.setattr(speed_layers, "_DOT_ENTRIES", 100)
    for m, k in ((50, 10), (10, 50)):
        run, factor = speed_layers._dot(m, k, 3)
        assert factor == 5
        assert run().shape == ((10 if m > k else m), 3)


@pytest.mark.usefixtures("tiny_vgg")
@pytest.mark.slow
def test_layers_and_check_in_process(capsys):
    config = speed.SpeedConfig(
        model="vgg_small", width=0.125, batch_size=4, image_size=8, repeats=1, layers=True
    )
    run = measure(config.request("layers", 1))
    assert set(run["totals"]) == set(speed_layers.PRODUCTS)
    total = run["totals"]["forward"]["implementations"]["xla"]
    each = [
        e["count"] * e["products"]["forward"]["implementations"]["xla"]["median"]
        for e in run["layers"]
    ]
    assert total == pytest.approx(sum(each))
    checked = measure(config.request("check", 1))
    assert all(line["ok"] for line in checked["check"])
    assert "input_grad" in capsys.readouterr().err
    report = {"runs": [], "layers": [run], "check": [checked]}
    assert json.loads(json.dumps(report)) == report
    written = json.dumps(report)
    text = speed_report.tables(report, config.setting())
    assert json.dumps(report) == written  # what is shown is not changed by it
    assert "weight_grad shared" in text
    assert "max difference" in text


@pytest.mark.parametrize("product", ["forward", "input_grad", "weight_grad shared"])
def test_differences_are_found(product):
    want = np.random.default_rng(0).normal(size=(3, 4, 4, 5)).astype(np.float32)
    assert speed_layers.difference(want, want, product) == 0
    other = want.copy()
    other[0, 0, 0, 0] += 0.01
    assert speed_layers.difference(other, want, product) > speed_layers.TOLERANCE
    other[0, 0, 0, 0] = np.nan
    assert speed_layers.difference(other, want, product) == math.inf
    assert speed_layers.difference(want.astype(np.float64), want, product) == math.inf
    assert speed_layers.difference(0 * want, 0 * want, product) == 0


def test_a_mismatch_is_the_exit_status(monkeypatch, capsys):
    line = {"implementation": "xla", "product": "forward", "layers": 1, "difference": 1.0}
    line |= {"ms": 1.0, "xla_ms": 1.0, "declined": [], "ok": False}
    run = {"threads": 1, "machine": machine.describe(), "check": [line]}
    monkeypatch.setattr(speed, "in_process", lambda request: run)
    with pytest.raises(SystemExit) as stop:
        speed.main(speed.SpeedConfig(check=True))
    assert stop.value.code == 1
    assert "DIFFERS" in capsys.readouterr().out
    declined = line | {"layers": 0, "declined": ["stages/0/1: too small"], "ok": True}
    report = {"runs": [], "layers": [], "check": [run | {"check": [declined]}]}
    text = speed_report.tables(report, TINY)
    assert "xla, forward declined: stages/0/1: too small" in text


def test_the_report_round_trips_and_draws(monkeypatch, tmp_path, capsys):
    without_pauses(monkeypatch)

    def in_process(request):
        if request["kind"] == "rss":
            return {"before": 2**20, "building": 2**22, "steps": None}
        return run_of(measure_steps(TINY, [Fake("torch"), Fake("jax")], warmup=1, repeats=1))

    monkeypatch.setattr(speed, "in_process", in_process)
    path, picture = tmp_path / "speed.json", tmp_path / "speed.png"
    speed.main(speed.SpeedConfig(threads=("1",), memory=True, json=path, plot=picture))
    report = json.loads(path.read_text())
    assert report["runs"][0]["contenders"]["jax"]["rss"]["building"] == 2**22
    assert report["runs"][0]["machine"]["versions"]["jax"] == jax.__version__
    assert report["options"]["model"] == "vgg16"
    assert picture.read_bytes().startswith(b"\x89PNG")
    text = capsys.readouterr().out
    assert "vs torch" in text
    assert "RSS steps" in text
    assert "nothing" in text


@pytest.mark.slow
def test_one_measurement_in_a_process_of_its_own():
    config = speed.SpeedConfig(
        model="vgg_small", width=0.125, batch_size=2, image_size=8, threads=("1",), repeats=1
    )
    result = speed.in_process(config.request("rss", 1, "full_precision"))
    assert result["building"] > result["before"] > 0
    with pytest.raises(UserError, match="unknown contender 'nobody'"):
        speed.in_process(config.request("steps", 1, "nobody"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "vgg12"}, "unknown model 'vgg12'"),
        ({"recipes": ("fqt2",)}, "unknown recipe 'fqt2'"),
        ({"batch_size": 0}, "batch_size"),
        ({"repeats": 0}, "repeats"),
        ({"warmup": 0}, "warmup"),
        ({"width": 0.0}, "width"),
        ({"threads": ("0",)}, "threads must be"),
        ({"threads": ("many",)}, "threads must be"),
        ({"threads": ("100000",)}, "threads must be"),
        ({"plot": pathlib.Path("a.png"), "layers": True}, "plot"),
        ({"plot": pathlib.Path("a.jpeg")}, r"plot must end in \.png, \.svg, \.pdf; got a\.jpeg"),
        ({"memory": True, "check": True}, "memory"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(UserError, match=message):
        speed.SpeedConfig(**options)


def test_unknown_names_and_defaults():
    assert "xla" in resolve_implementations(["all"])
    assert [c.name for c in Roster(["qat"], [], ["qat/auto"]).contenders] == ["qat/auto"]
    assert resolve_implementations(["xla", "xla"]) == ["xla"]
    with pytest.raises(ValueError, match="unknown implementation 'abacus'"):
        resolve_implementations(["abacus"])
    with pytest.raises(UserError, match=r"unknown contender 'fqt1'; known: .*fqt1/xla"):
        Roster(["fqt1"], ["xla"], ["fqt1"])
    roster = Roster(["fqt1", "full_precision"], ["xla"], ["jax", "fqt1/xla"])
    assert [c.name for c in roster.contenders] == ["jax", "fqt1/xla"]


def test_without_torch_the_rest_runs(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    roster = Roster(["qat"], ["xla"], [])
    assert [c.name for c in roster.contenders] == ["jax", "jax_bf16", "qat/xla"]
    assert "fqt-jax[bench]" in roster.left_out[0]
    with pytest.raises(UserError, match="not installed"):
        Roster(["qat"], ["xla"], ["torch"])


def test_an_unwritable_path_is_found_before_measuring(monkeypatch, tmp_path):
    monkeypatch.setattr(speed, "in_process", lambda request: pytest.fail("measured"))
    for option in ("json", "plot"):
        config = speed.SpeedConfig(**{option: tmp_path / "missing" / "file.png"})
        with pytest.raises(FileNotFoundError):
            speed.main(config)


def test_a_file_is_whole_or_as_it_was(monkeypatch, tmp_path):
    def fails(request):
        raise UserError("unknown contender")

    monkeypatch.setattr(speed, "in_process", fails)
    old = tmp_path / "old.json"
    old.write_text("{}")
    for path in (old, tmp_path / "new.json"):
        with pytest.raises(UserError):
            speed.main(speed.SpeedConfig(json=path))
    assert old.read_text() == "{}"
    assert list(tmp_path.iterdir()) == [old]


@pytest.mark.parametrize(
    "name", ["vgg16", "resnet18", "resnet50", "mobilenet", "vit_small", "gpt_small"]
)
def test_the_torch_model_has_as_many_parameters(name):
    pytest.importorskip("torch")
    from experiments.bench.torch_steps import create_torch_model

    setting = Setting(name, 1.0, 1, 32)

    def shapes():
        return nnx.state(setting.create_model(), nnx.Param)

    mine = sum(math.prod(x.shape) for x in jax.tree.leaves(jax.eval_shape(shapes)))
    assert mine == sum(p.numel() for p in create_torch_model(setting).parameters())


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("vgg_small", 17),
        ("resnet18", 16),
        ("resnet18", 97),
        ("resnet50", 17),
        ("mobilenet", 33),
        ("vit_small", 16),
        ("gpt_small", 32),
    ],
)
def test_the_torch_model_computes_the_same(name, size):
    torch = pytest.importorskip("torch")
    from experiments.bench.torch_steps import create_torch_model

    setting = Setting(name, 0.125, 2, size)
    model = setting.create_model()
    theirs = create_torch_model(setting)
    # The submodules have the same names.
    with torch.no_grad():
        for path, value in theirs.named_parameters():
            *parents, leaf = path.split(".")
            module = model
            for part in parents:
                if part.isdecimal():
                    module = getattr(module, "layers", module)[int(part)]
                else:
                    module = getattr(module, part)
            if parents == []:
                array = np.asarray(getattr(model, leaf)[...])
            elif isinstance(module, nnx.Embed):
                array = np.asarray(module.embedding[...])
            elif isinstance(module, nnx.Conv) and leaf == "weight":
                array = np.asarray(module.kernel[...]).transpose(3, 2, 0, 1)
            elif isinstance(module, nnx.Linear) and leaf == "weight":
                array = np.asarray(module.kernel[...]).T
            else:
                array = np.full(value.shape, 0.0 if leaf == "bias" else value[0])
            value.copy_(torch.from_numpy(array.copy()))
    inputs, _ = setting.batch()
    model.train()
    graphdef, state = nnx.split(model)
    mine = jax.jit(lambda state, x: nnx.merge(graphdef, state)(x))(state, inputs)
    given = torch.from_numpy(inputs)
    got = theirs(given if setting.is_text else given.permute(0, 3, 1, 2)).detach().numpy()
    np.testing.assert_allclose(mine, got, rtol=1e-3, atol=1e-4)
