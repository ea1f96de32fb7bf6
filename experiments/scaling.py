"""What a training step takes on more devices, and what devices send to each other.

    python -m experiments.scaling

Measures on the devices of this machine, virtual ones of a CPU, in one process and in several; reads
what is sent from the compiled programs; and computes from both what many hosts would take.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Literal

from experiments import cli
from experiments.bench import machine
from experiments.bench.scaling import Measured, Network, measure, predicted_seconds
from experiments.show.formats import Table, show


@dataclasses.dataclass(frozen=True)
class ScalingConfig:
    """What is measured, and of which hosts it tells."""

    model: str = "vgg_small"
    """Model, as for experiments.finetune."""
    width: float = 1.0
    """Factor on its number of channels."""
    image_size: int = 32
    """Height and width of its images."""
    recipe: str = "fqt1"
    """Recipe, by name."""
    batch_size: int = 128
    """Images in a step on this machine, on all devices; and on each host of the prediction."""
    batch_statistics: Literal["synchronized", "local"] = "synchronized"
    """What batch norms take."""
    devices: tuple[int, ...] = (1, 2, 4, 8)
    """Numbers of virtual devices in one process."""
    processes: tuple[int, ...] = (2,)
    """Numbers of processes besides one, each with one device."""
    steps: int = 10
    """Steps whose median is taken."""
    hosts: tuple[int, ...] = (1, 2, 8, 64)
    """Numbers of hosts in the prediction."""
    gigabits: tuple[float, ...] = (1.0, 10.0, 100.0)
    """Bandwidths of the prediction, in Gbit/s that each host sends."""
    latency_us: float = 20.0
    """What a message takes in the prediction, in microseconds."""
    out: pathlib.Path | None = None
    """File for the numbers, as JSON."""

    def __post_init__(self) -> None:
        for name in ("devices", "processes", "hosts", "gigabits"):
            if min(getattr(self, name), default=0) <= 0:
                raise cli.UserError(f"{name} must be positive numbers.")
        if self.steps < 1 or self.latency_us < 0:
            raise cli.UserError("steps must be at least 1, and latency_us at least 0.")
        for count in (*self.devices, *self.processes):
            if self.batch_size % count:
                raise cli.UserError(
                    f"batch_size must be a multiple of {count} devices; got {self.batch_size}."
                )

    def request(self, devices: int, processes: int, reduce: str) -> dict[str, object]:
        """What a measuring process is asked for."""
        return {
            "model": self.model,
            "width": self.width,
            "image_size": self.image_size,
            "recipe": self.recipe,
            "batch_size": self.batch_size,
            "statistics": self.batch_statistics,
            "steps": self.steps,
            "devices": devices,
            "processes": processes,
            "reduce": reduce,
        }


def main(config: ScalingConfig) -> None:
    """Runs the measurements and prints both tables."""
    found = []
    for count, processes in [
        *((n, 1) for n in config.devices),
        *((n, n) for n in config.processes),
    ]:
        for reduce in ("floats", "signs"):
            print(f"measuring {_devices(count, processes)}, gradients as {reduce}", flush=True)
            found.append(measure(config.request(count, processes, reduce)))
    name = f"{config.model} x{config.width:g}, {config.recipe}, {config.batch_size} images a step"
    tables = [measured_table(name, found)]
    if any(each.devices > 1 for each in found) and any(each.devices == 1 for each in found):
        tables += [predicted_table(config, found, gigabits) for gigabits in config.gigabits]
    show(tables)
    if config.out is not None:
        numbers = [dataclasses.asdict(each) for each in found]
        result = {"machine": machine.describe(), "measured": numbers}
        config.out.write_text(json.dumps(result, indent=2) + "\n")


def _devices(count: int, processes: int) -> str:
    what = f"{count} device" + ("s" if count > 1 else "")
    return what if processes == 1 else f"{what} in {processes} processes"


def measured_table(name: str, found: list[Measured]) -> Table:
    """What was measured."""
    rows = [
        [
            _devices(each.devices, each.processes),
            each.reduce,
            f"{each.milliseconds:.0f}",
            f"{each.sent() / 1e6:.3f}",
            f"{each.temporaries / 1e6:.1f}",
        ]
        for each in found
    ]
    head = ["devices", "gradients", "ms a step", "MB sent by each", "MB of temporaries on each"]
    return Table(name, head, rows)


def predicted_table(config: ScalingConfig, found: list[Measured], gigabits: float) -> Table:
    """What hosts with a batch each would take, from one device's time and what many send."""
    network = Network(gigabits * 1e9 / 8, config.latency_us * 1e-6)
    alone = [each for each in found if each.devices == 1]
    linear = next(each.milliseconds for each in alone if each.reduce == "floats") / 1000
    rows = []
    for hosts in config.hosts:
        row = [str(hosts)]
        for reduce in ("floats", "signs"):
            most = max((e for e in found if e.reduce == reduce), key=lambda each: each.devices)
            compute = next(e.milliseconds for e in alone if e.reduce == reduce) / 1000
            seconds = predicted_seconds(compute, most.collectives, hosts, network)
            sent = most.sent(hosts) if hosts > 1 else 0.0
            row += [f"{sent / 1e6:.2f}", f"{1000 * seconds:.0f}", f"{linear / seconds:.0%}"]
        rows.append(row)
    head = ["hosts", *(f"{r}: {what}" for r in ("floats", "signs") for what in _PREDICTED)]
    title = f"predicted: {gigabits:g} Gbit/s, {config.latency_us:g} us a message"
    return Table(title, head, rows)


_PREDICTED = ("MB sent", "ms a step", "of linear")


if __name__ == "__main__":
    cli.run(main, ScalingConfig)
