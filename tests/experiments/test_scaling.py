import json
import pathlib

import pytest

from experiments import cli
from experiments.bench.scaling import Measured, Network, predicted_seconds
from experiments.bench.traffic import Collective, collectives
from experiments.scaling import ScalingConfig, main, measured_table, predicted_table

ROOT = pathlib.Path(__file__).parents[2]
REDUCE = Collective("all-reduce", "f32", 1000, 4000, None)
GATHER = Collective("all-gather", "u8", 800, 800, 0)


def test_what_is_sent_follows_the_kind():
    assert REDUCE.sent(4) == 2 * 3 / 4 * 4000
    assert GATHER.sent(4) == 3 / 4 * 800
    assert Collective("reduce-scatter", "f32", 10, 40, None).sent(4) == 3 * 40
    assert REDUCE.sent(1) == 0


def test_programs_are_read_with_tuples_types_and_branches():
    text = """
    %r = (f32[3,3]{1,0}, /*index=1*/f32[]) all-reduce(%a, %b), metadata={op_name="jit(s)/psum"}
    %g.1 = u8[384]{0} all-gather(%c), metadata={op_name="jit(s)/cond/branch_0_fun/all_gather"}
    %start = bf16[2,2]{1,0} all-reduce-start(%d), metadata={op_name="jit(s)/branch_1_fun/psum"}
    %done = bf16[2,2]{1,0} all-reduce-done(%start)
    %x = f32[8] fusion(%all-reduce.3), calls=%all-gather
    """
    assert collectives(text) == [
        Collective("all-reduce", "f32", 10, 40, None),
        Collective("all-gather", "u8", 384, 384, 0),
        Collective("all-reduce", "bf16", 4, 8, 1),
    ]


def test_the_prediction_adds_what_is_sent_and_what_is_waited_for():
    network = Network(bandwidth=1000.0, latency=0.5)
    assert predicted_seconds(2.0, [REDUCE, GATHER], 1, network) == 2.0
    sent = (2 * 4000 + 800) * 3 / 4 / 1000
    messages = (2 * 3 + 3) * 0.5
    assert predicted_seconds(2.0, [REDUCE, GATHER], 4, network) == pytest.approx(
        2 + sent + messages
    )


def test_tables_have_a_line_for_each_measurement_and_each_number_of_hosts():
    found = [
        Measured(devices, 1, reduce, 100.0, 5_000_000, (each,) if devices > 1 else ())
        for reduce, each in (("floats", REDUCE), ("signs", GATHER))
        for devices in (1, 8)
    ]
    rows = measured_table("name", found).rows
    assert rows[1] == ["8 devices", "floats", "100", "0.007", "5.0"]
    config = ScalingConfig(hosts=(1, 64), latency_us=0.0)
    rows = predicted_table(config, found, 0.000064).rows  # 8000 bytes a second
    assert rows[0] == ["1", "0.00", "100", "100%", "0.00", "100", "100%"]
    milliseconds = 100 + 1000 * 2 * 63 / 64 * 4000 / 8000
    assert rows[1][1:3] == ["0.01", f"{milliseconds:.0f}"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"devices": (0,)}, "devices must be positive numbers"),
        ({"gigabits": ()}, "gigabits must be positive numbers"),
        ({"batch_size": 12}, "batch_size must be a multiple of 8 devices; got 12"),
        ({"steps": 0}, "steps must be at least 1"),
    ],
)
def test_numbers_that_make_no_sense_are_named(options, message):
    with pytest.raises(cli.UserError, match=message):
        ScalingConfig(**options)


@pytest.mark.slow
@pytest.mark.usefixtures("own_folder")
def test_it_measures_devices_and_processes(capsys, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    config = ScalingConfig(
        width=0.25, image_size=8, batch_size=8, devices=(1, 2), steps=2, out=pathlib.Path("out")
    )
    main(config)
    found = json.loads(pathlib.Path("out").read_text())["measured"]
    shapes = [(each["devices"], each["processes"]) for each in found]
    assert shapes == [(1, 1), (1, 1), (2, 1), (2, 1), (2, 2), (2, 2)]
    sent = [sum(c[3] for c in each["collectives"]) for each in found]
    assert sent[0] == sent[1] == 0
    assert sent[2] == sent[4] > 4 * sent[3] > 0
    assert sent[3] == sent[5]
    assert "2 devices in 2 processes" in capsys.readouterr().out
    with pytest.raises(cli.UserError, match=r"a measuring process failed: .*unknown model"):
        main(ScalingConfig(model="nothing", batch_size=8))
