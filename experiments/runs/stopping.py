"""When a run stops before its last epoch, and which epoch is its best."""

from __future__ import annotations

from typing import Any

History = list[dict[str, Any]]
"""The lines of a run's ``metrics.jsonl``."""


def best_epoch(history: History) -> dict[str, Any]:
    """The line of the highest validation accuracy, the first of equals.

    Example:
      >>> found = (0.5, 0.7, 0.7)
      >>> lines = [{"epoch": i + 1, "validation_accuracy": x} for i, x in enumerate(found)]
      >>> best_epoch(lines)["epoch"]
      2
    """
    return max(history, key=lambda line: line["validation_accuracy"])


def reason_to_stop(history: History, patience: int | None) -> str | None:
    """Why a run stops here, if it does.

    Args:
      history: its epochs so far.
      patience: how many epochs in a row may bring no better validation accuracy; None for any.

    Example:
      >>> found = (0.7, 0.5, 0.7)
      >>> lines = [{"epoch": i + 1, "validation_accuracy": x} for i, x in enumerate(found)]
      >>> reason_to_stop(lines[:2], 2), reason_to_stop(lines, None)
      (None, None)
      >>> reason_to_stop(lines, 2)
      'after epoch 3: no better validation accuracy than 70.0% of epoch 1 in 2 epochs'
    """
    if patience is None or not history:
        return None
    best, last = best_epoch(history), history[-1]["epoch"]
    since = last - best["epoch"]
    if since < patience:
        return None
    return (
        f"after epoch {last}: no better validation accuracy than "
        f"{best['validation_accuracy']:.1%} of epoch {best['epoch']} in {since} "
        f"{'epoch' if since == 1 else 'epochs'}"
    )
