"""What a run shows: progress while it trains, a summary and a picture of its curves."""

from __future__ import annotations

import contextlib
import pathlib
import sys
import time
from collections.abc import Iterator
from typing import Any

import rich.progress

from experiments import distributed
from experiments.show import style
from experiments.show.curves import curve
from fqt_jax.text import format_table


class Progress:
    """A plain line at the end of each epoch, and on a terminal a progress bar below them."""

    def __init__(self, total_steps: int, samples: str = "images"):
        self._total, self._samples = total_steps, samples
        self._rate = _Rate()
        self._seconds = self._waited = 0.0  # of all epochs
        self._bar: rich.progress.Progress | None = None
        self._task: rich.progress.TaskID | None = None
        if sys.stdout.isatty():
            self._bar = rich.progress.Progress(
                rich.progress.TextColumn("epoch {task.fields[epoch]}"),
                rich.progress.BarColumn(),
                rich.progress.MofNCompleteColumn(),
                rich.progress.TextColumn(
                    "loss {task.fields[loss]:.3f}  accuracy {task.fields[accuracy]}  "
                    f"{{task.fields[rate]}} {samples}/s"
                ),
                rich.progress.TimeRemainingColumn(),
            )

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task(
                "", total=self._total, epoch=1, loss=float("nan"), accuracy="-", rate="-"
            )
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def count_from_here(self) -> None:
        """Images a second count from here on: at the start of an epoch, and after compilation."""
        self._rate.restart()

    def count_to_here(self) -> None:
        """The end of an epoch's steps."""
        self._rate.stop()
        self._seconds += self._rate.seconds
        self._waited += self._rate.waited

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """In this block the device has nothing to do, and waits for a batch."""
        began = time.perf_counter()
        yield
        self._rate.waited += time.perf_counter() - began

    @property
    def wait_fraction(self) -> float:
        """The share of what was counted in which the device waited."""
        return self._waited / self._seconds if self._seconds else 0.0

    def step(self, done: int, epoch: int, loss: float, images: int) -> None:
        """Reports the loss of a step that is over, the ``done``-th of the run."""
        self._rate.add(images)
        if self._bar is not None and self._task is not None:
            self._bar.update(
                self._task, completed=done, epoch=epoch + 1, loss=loss, rate=str(self._rate)
            )

    def epoch(self, line: dict[str, Any], epochs: int) -> None:
        """Reports the end of an epoch."""
        if self._bar is not None and self._task is not None:
            accuracy = f"{line['validation_accuracy']:.1%}"
            self._bar.update(self._task, completed=line["step"], accuracy=accuracy)
        # On a terminal it appears above the bar, which takes over the standard output.
        print(
            f"epoch {line['epoch']}/{epochs}: loss {line['train_loss']:.4f}, "
            f"training accuracy {line['train_accuracy']:.1%}, "
            f"validation accuracy {line['validation_accuracy']:.1%}, "
            f"{_bits(line, 'validation')}{self._rate} {self._samples}/s, "
            f"{self._rate.wait_fraction:.0%} waiting for them",
            flush=True,
        )


def _bits(line: dict[str, Any], part: str) -> str:
    """Bits per character, of text alone."""
    bits = line.get(f"{part}_bits")
    return "" if bits is None else f"{bits:.3f} bits per character, "


class _Rate:
    """Images a second since a moment, to now or to another; a dash where there were none."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self._since, self._images, self.waited = time.perf_counter(), 0, 0.0
        self._until: float | None = None

    def stop(self) -> None:
        self._until = time.perf_counter()

    def add(self, images: int) -> None:
        self._images += images

    @property
    def seconds(self) -> float:
        return (self._until or time.perf_counter()) - self._since

    @property
    def wait_fraction(self) -> float:
        return self.waited / self.seconds if self.waited else 0.0

    def __str__(self) -> str:
        return f"{self._images / self.seconds:.0f}" if self._images else "-"


def print_summary(summary: dict[str, Any], folder: pathlib.Path) -> None:
    """Prints what a run came to."""
    found = {name: summary[name] for name in ("dataset", "model")} | {"recipe": summary["variant"]}
    found |= {name: summary[name] for name in ("optimizer", "start", "epochs")}
    if summary.get("stopped"):
        found["stopped"] = summary["stopped"]
    if summary.get("tested_epoch", summary["epochs"]) != summary["epochs"]:
        found["tested"] = f"epoch {summary['tested_epoch']}, the best by validation accuracy"
    found["parameters"] = f"{summary['parameters']:,}"
    found["validation accuracy"] = f"{summary['validation_accuracy']:.2%}"
    samples = f"{summary['test_images']} {summary.get('samples', 'images')}"
    found["test accuracy"] = f"{summary['test_accuracy']:.2%} of {samples}"
    if "test_bits" in summary:
        found["test, bits per character"] = f"{summary['test_bits']:.3f}"
    found["seconds"] = summary["seconds"]
    rows = [[name, str(value)] for name, value in found.items()]
    print(format_table([summary["experiment"], str(folder)], rows, names=2))


def plot_curves(
    history: list[dict[str, Any]], summary: dict[str, Any] | None, path: pathlib.Path
) -> None:
    """Draws loss and accuracy over the epochs; with a summary, the test accuracy too."""
    if not distributed.first():
        return
    title = ""
    if summary is not None:
        title = (
            f"{summary['dataset']}, {summary['model']} x{summary['width']:g}, "
            f"{summary['variant']}, {summary['optimizer']}, seed {summary['seed']}"
        )
    with style.figure(1, 2, size=(9, 3.4), title=title) as (figure, grid):
        loss, accuracy = grid[0]
        for name, label in (("train", "training"), ("validation", "validation")):
            curve(loss, [history], f"{name}_loss", label)
            curve(accuracy, [history], f"{name}_accuracy", label, factor=100)
        loss.set(xlabel="epoch", ylabel="cross-entropy (nats)")
        accuracy.set(xlabel="epoch", ylabel="accuracy (%)")
        if summary is not None:
            test = 100 * summary["test_accuracy"]
            label = f"test, at the end: {test:.1f}"
            accuracy.axhline(test, color="black", linestyle=":", linewidth=1, label=label)
        loss.legend()
        accuracy.legend()
        style.whole_ticks(loss, accuracy)
        style.save(figure, path)
