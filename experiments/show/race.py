"""Accuracy over time: when each contender reaches a target, as tables and curves."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence

import numpy as np

from experiments.show import style
from experiments.show.formats import Table, count, number


@dataclasses.dataclass(frozen=True)
class Course:
    """What one contender does in a race.

    Attributes:
      name: of the contender.
      quantized: whether it is one of the library's recipes, and no float.
      variant: its recipe, which gives it its colour.
      rate: its learning rate.
      step: seconds of a step.
      first: seconds until its first step is over: building and compilation.
      steps: how many steps it has done at the end of each epoch.
      accuracy: in % at the end of each epoch, for each seed that finished.
    """

    name: str
    quantized: bool
    variant: str
    rate: float | None
    step: float
    first: float
    steps: Sequence[int]
    accuracy: Sequence[Sequence[float]]

    @property
    def mean(self) -> np.ndarray:
        """The accuracy over the seeds, by epoch; empty where none finished."""
        return np.mean(self.accuracy, axis=0) if self.accuracy else np.empty(0)

    def steps_to(self, target: float) -> int | None:
        """Steps until the mean accuracy is at a target, at the end of an epoch; or None.

        Example:
          >>> course = Course("fqt1", True, "fqt1", 1e-3, 0.5, 4.0, [30, 60], [[90, 96], [92, 98]])
          >>> course.steps_to(91), course.steps_to(95), course.steps_to(99)
          (30, 60, None)
        """
        reached = np.flatnonzero(self.mean >= target)
        return int(self.steps[reached[0]]) if reached.size else None

    def seconds_to(self, target: float) -> float | None:
        """Seconds of those steps, or None.

        Example:
          >>> course = Course("fqt1", True, "fqt1", 1e-3, 0.5, 4.0, [30, 60], [[90, 96], [92, 98]])
          >>> course.seconds_to(91)
          15.0
        """
        steps = self.steps_to(target)
        return None if steps is None else steps * self.step


def tables(title: str, courses: Sequence[Course], targets: dict[str, float]) -> list[Table]:
    """Seconds to each target, and how many times as fast as the fastest float that is.

    Args:
      title: what they were trained for.
      courses: of the contenders.
      targets: accuracies in %, by the titles of their columns.
    """
    seeds = max((len(course.accuracy) for course in courses), default=0)
    rows, ratios = [], []
    for course in courses:
        row = [course.name, number(course.rate), _three(1e3 * course.step), f"{course.first:.1f}"]
        last = f"{course.mean[-1]:.1f}" if course.accuracy else "-"
        if 0 < len(course.accuracy) < seeds:
            last += f" (n = {len(course.accuracy)})"
        rows.append([*row, *(_reached(course, target) for target in targets.values()), last])
        if course.quantized:
            ratios.append([course.name, *(_ratio(course, courses, t) for t in targets.values())])
    columns = ["contender", "rate", "step, ms", "first, s", *targets, "at the end, %"]
    notes = [
        "Seconds of training steps, and their number, until the mean accuracy on the test images "
        f"over {count(seeds, 'seed')} is there, looked at after each epoch; a dash where it never "
        "is. Compilation is apart: first is the time until the first step is over.",
        "All float contenders take the accuracy of fp32 in JAX, at its rate.",
    ]
    shown = [Table(f"{title}: time to accuracy", columns, rows, notes)]
    if ratios:
        text = f"{title}: how many times as fast as the fastest float there"
        shown.append(Table(text, ["contender", *targets], ratios))
    return shown


def _reached(course: Course, target: float) -> str:
    seconds = course.seconds_to(target)
    return "-" if seconds is None else f"{_three(seconds)} ({course.steps_to(target)})"


def _three(value: float) -> str:
    """A number with three digits or more."""
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _ratio(course: Course, courses: Sequence[Course], target: float) -> str:
    seconds = course.seconds_to(target)
    floats = [each.seconds_to(target) for each in courses if not each.quantized]
    best = min((each for each in floats if each is not None), default=None)
    if seconds is None:
        return "-" if best is None else "float alone"
    return "no float" if best is None else f"{best / seconds:.2f}"


def plot(panels: Sequence[tuple[str, Sequence[Course]]], path: pathlib.Path) -> None:
    """Draws accuracy over the time spent in steps, a panel for each task and model.

    Args:
      panels: the title of each, and its courses.
      path: of the file.
    """
    size = (4.6 * len(panels) + 0.6, 4.4)
    title = "Accuracy on the test images over the time of the steps: mean over seeds, and range"
    with style.figure(1, len(panels), size=size, title=title) as (figure, grid):
        for axes, (name, courses) in zip(grid[0], panels, strict=True):
            drawn = [course for course in courses if course.accuracy]
            lines = style.recipe_lines([course.variant for course in drawn])
            for course, line in zip(drawn, lines, strict=True):
                seconds = np.asarray(course.steps) * course.step
                (made,) = axes.plot(seconds, course.mean, label=course.name, **line)
                low, high = np.min(course.accuracy, axis=0), np.max(course.accuracy, axis=0)
                axes.fill_between(
                    seconds, low, high, color=made.get_color(), alpha=0.12, linewidth=0
                )
            axes.set(xscale="log", xlabel="seconds of training steps", title=style.fill(name, 50))
            if drawn:
                style.number_ticks(axes.xaxis)
                axes.legend(loc="lower right")
        grid[0, 0].set_ylabel("accuracy (%)")
        style.save(figure, path)
