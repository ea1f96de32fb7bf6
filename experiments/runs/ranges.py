"""What the numbers among a run's options may be."""

from __future__ import annotations

from typing import TYPE_CHECKING

from experiments.cli import UserError
from experiments.runs.kinds import kind_named

if TYPE_CHECKING:
    from experiments.runs.config import RunConfig

MAX_WIDTH, MAX_IMAGE_SIZE = 16, 4096
"""More than anybody means: a width of 16 is 256 times the products."""

_RANGES: tuple[tuple[str, int, float], ...] = (
    ("epochs", 1, float("inf")),
    ("batch_size", 1, float("inf")),
    ("pad", 0, MAX_IMAGE_SIZE),
    ("image_size", 1, MAX_IMAGE_SIZE),
    ("limit", 1, float("inf")),
    ("cosine_epochs", 1, float("inf")),
    ("patience", 1, float("inf")),
    ("workers", 0, float("inf")),
)
"""The whole numbers among the options, with the least and the greatest that they may be."""


def check_numbers(config: RunConfig) -> None:
    """Checks what can be seen of the options alone.

    Raises:
      UserError: a number is out of its range, or contradicts another.
    """
    for name, lowest, highest in _RANGES:
        value = getattr(config, name)
        if value is not None and not lowest <= value <= highest:
            limit = f"at least {lowest}" if value < lowest else f"at most {highest}"
            raise UserError(f"{name} must be {limit}; got {value}.")
    if not 0 < config.reduce_warmup < 1:
        raise UserError(f"reduce_warmup must be in (0, 1); got {config.reduce_warmup}.")
    if isinstance(config.devices, int) and config.devices < 1:
        raise UserError(f"devices must be at least 1, or all; got {config.devices}.")
    if not 0 < config.validation_fraction < 1:
        raise UserError(f"validation_fraction must be in (0, 1); got {config.validation_fraction}.")
    if not 0 <= config.label_smoothing < 1:
        raise UserError(f"label_smoothing must be in [0, 1); got {config.label_smoothing}.")
    if not 0 < config.width <= MAX_WIDTH:
        raise UserError(f"width must be positive and at most {MAX_WIDTH}; got {config.width}.")
    if not 0 <= config.seed < 2**32:
        raise UserError(f"seed must be from 0 to 2^32 - 1; got {config.seed}.")
    if config.save_minutes is not None and not 0 < config.save_minutes < float("inf"):
        raise UserError(f"save_minutes must be a positive number; got {config.save_minutes}.")
    if not 0 <= config.warmup_epochs < config.epochs:
        raise UserError(
            f"warmup_epochs must be at least 0 and below epochs, which is {config.epochs}; got "
            f"{config.warmup_epochs}."
        )
    if config.cosine_epochs is not None:
        if config.schedule == "constant":
            raise UserError("cosine_epochs has no effect on a constant schedule.")
        if (config.epochs - config.warmup_epochs) % config.cosine_epochs:
            raise UserError(
                f"cosine_epochs must divide the {config.epochs - config.warmup_epochs:g} epochs "
                f"after warm-up; got {config.cosine_epochs}."
            )
    if config.limit is not None and config.batch_size > config.limit:
        raise UserError(
            f"batch_size is {config.batch_size}, but limit leaves only {config.limit} "
            f"{kind_named(config.dataset).samples}."
        )
