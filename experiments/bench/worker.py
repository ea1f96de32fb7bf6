"""One measurement of experiments.speed in a process of its own, with its own number of threads.

    python -m experiments.bench.worker REQUEST RESULT

reads what to measure from the file REQUEST and writes what came out to the file RESULT, both JSON.
"""

from __future__ import annotations

import json
import pathlib
import sys
from typing import Any

from experiments import process
from experiments.bench import machine


def main(request: dict[str, Any]) -> dict[str, Any]:
    """Carries out a request; an error of the user's comes back as ``error``."""
    # XLA, OpenBLAS and OpenMP size their thread pools when they are first used.
    machine.limit_cpus(request["threads"])
    from experiments.bench import measure

    try:
        return measure.measure(request)
    except (measure.UserError, ValueError) as error:
        return {"error": str(error)}


if __name__ == "__main__":
    process.end_with_parent()
    outcome = main(json.loads(pathlib.Path(sys.argv[1]).read_text()))
    pathlib.Path(sys.argv[2]).write_text(json.dumps(outcome))
