"""A training step on a number of devices: its time, what devices send, and a model of more hosts.

    python -m experiments.bench.scaling REQUEST PROCESS ADDRESS

is one process of a measurement: it reads the file REQUEST, joins the others at ADDRESS, and the
first prints what came out as a line of JSON.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

from experiments import process
from experiments.bench.traffic import Collective, collectives
from experiments.cli import UserError


@dataclasses.dataclass(frozen=True)
class Measured:
    """What a step on some devices came to.

    Attributes:
      devices, processes: how many, of all processes together.
      reduce: ``"floats"`` or ``"signs"``.
      milliseconds: a step, the median.
      temporaries: bytes that a step needs on each device besides its arguments and results.
      collectives: what crosses between devices.
    """

    devices: int
    processes: int
    reduce: str
    milliseconds: float
    temporaries: int
    collectives: tuple[Collective, ...]

    def sent(self, devices: int | None = None) -> float:
        """Bytes that each device sends in a step, on as many devices or on others."""
        return sum(each.sent(devices or self.devices) for each in self.collectives)


def measure(request: dict[str, Any]) -> Measured:
    """Measures in processes of their own.

    Raises:
      UserError: one failed.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    each = request["devices"] // request["processes"]
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": str(each)}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as held:
        path = pathlib.Path(folder, "request.json")
        path.write_text(json.dumps(request))
        workers = []
        for i in range(request["processes"]):
            out, err = (held.enter_context(open(f"{folder}/{i}.{n}", "w")) for n in ("out", "err"))
            worker = subprocess.Popen(
                [sys.executable, "-m", "experiments.bench.scaling", str(path), str(i), address],
                env=environment,
                stdin=subprocess.PIPE,  # which ends with this process, and the worker with it
                stdout=out,
                stderr=err,
                start_new_session=True,
            )
            held.enter_context(worker)
            held.enter_context(process.on_stop(worker.kill))
            held.callback(worker.kill)
            workers.append(worker)
        for i, worker in enumerate(workers):
            if worker.wait():
                lines = pathlib.Path(folder, f"{i}.err").read_text().splitlines()
                raise UserError(f"a measuring process failed: {(lines or ['killed'])[-1]}")
        found = json.loads(pathlib.Path(folder, "0.out").read_text().splitlines()[-1])
    found["collectives"] = tuple(Collective(*each) for each in found["collectives"])
    return Measured(**found)


def run_here(request: dict[str, Any]) -> Measured:
    """Measures in this process, on all its devices and those of the processes it has joined."""
    import jax
    import numpy as np
    from flax import nnx

    from fqt_jax import quantize
    from fqt_jax.exchange import Mean, Signs
    from fqt_jax.mesh import data_mesh, replicate, shard_batch
    from fqt_jax.models import create_model
    from fqt_jax.optimizers import adam
    from fqt_jax.training import CrossEntropy, create_state, make_train_step, place_state

    size, batch_size = request["image_size"], request["batch_size"]
    model = create_model(
        request["model"],
        num_classes=10,
        in_features=3,
        width=request["width"],
        image_size=(size, size),
        rngs=nnx.Rngs(0),
    )
    model = quantize(model, request["recipe"]).model
    mesh, loss, optimizer = data_mesh(), CrossEntropy(10), adam(1e-3, freeze_after=1)
    exchange = Signs(warmup=1) if request["reduce"] == "signs" else Mean()
    graphdef, state = create_state(model, optimizer, exchange=exchange, mesh=mesh)
    step = make_train_step(
        graphdef,
        optimizer,
        loss=loss,
        mesh=mesh,
        exchange=exchange,
        statistics=request["statistics"],
    )
    rng, mine = np.random.default_rng(jax.process_index()), batch_size // jax.process_count()
    images = rng.standard_normal((mine, size, size, 3)).astype(np.float32)
    batch = shard_batch({"image": images, "label": rng.integers(0, 10, mine, np.int32)}, mesh)
    state, key = place_state(state, mesh), replicate(jax.random.key(0), mesh)
    compiled = step.jitted.lower(state, batch, key).compile()
    seconds = []
    for _ in range(request["steps"] + 2):  # the first is a step of floats, in the warm-up
        began = time.perf_counter()
        state, value = compiled(state, batch, key)
        jax.block_until_ready(value)
        seconds.append(time.perf_counter() - began)
    # Of the two branches of an exchange by signs, the second is the warm-up.
    found = [each for each in collectives(compiled.as_text()) if each.branch != 1]
    return Measured(
        devices=jax.device_count(),
        processes=jax.process_count(),
        reduce=request["reduce"],
        milliseconds=1000 * statistics.median(seconds[2:]),
        temporaries=int(compiled.memory_analysis().temp_size_in_bytes),
        collectives=tuple(found if jax.device_count() > 1 else ()),
    )


@dataclasses.dataclass(frozen=True)
class Network:
    """What connects hosts: bytes a second that each sends, and seconds for a message."""

    bandwidth: float
    latency: float


def predicted_seconds(
    compute: float, found: Sequence[Collective], hosts: int, network: Network
) -> float:
    r"""Seconds of a step on hosts that share nothing but the network, each with its own batch.

    .. math:: t(n) = t_1 + \sum_c \Big( \frac{s_c(n)}{\text{bandwidth}}
       + h_c(n) \cdot \text{latency} \Big)

    :math:`s_c` are the bytes that a host sends in the collective operation :math:`c`, and
    :math:`h_c` the messages that it waits for, by rings: ``2 (n - 1)`` of an all-reduce and
    ``n - 1`` of another. Nothing is sent while anything is computed, which is the worst case.

    Args:
      compute: seconds of a step on one host, :math:`t_1`.
      found: the collective operations.
      hosts: their number, :math:`n`.
      network: the network.

    Example:
      >>> reduce = Collective("all-reduce", "f32", 1000, 4000, None)
      >>> predicted_seconds(1.0, [reduce], 2, Network(bandwidth=1000.0, latency=0.5))
      6.0
    """
    seconds = compute
    for each in found if hosts > 1 else ():
        messages = (hosts - 1) * (2 if each.kind == "all-reduce" else 1)
        seconds += each.sent(hosts) / network.bandwidth + messages * network.latency
    return seconds


def main(path: str, number: int, address: str) -> None:
    """One process of a measurement."""
    from experiments import distributed

    request = json.loads(pathlib.Path(path).read_text())
    count = request["processes"]
    if count > 1:
        joined = ["--coordinator", address, "--processes", str(count), "--process", str(number)]
        distributed.start(joined)
    found = run_here(request)
    if number == 0:
        print(json.dumps(dataclasses.asdict(found) | {"collectives": found.collectives}))
    distributed.settle()


if __name__ == "__main__":
    process.end_with_parent()
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
