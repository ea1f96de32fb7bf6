"""Options as they were saved: those of a run that is to be continued, or of a sweep's."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any, TypeVar

from experiments.cli import UserError
from experiments.runs.config import RunConfig

ConfigT = TypeVar("ConfigT", bound=RunConfig)

_PATHS = ("data_dir", "checkpoint", "weights", "cache")


def up_to_date(values: dict[str, Any]) -> dict[str, Any]:
    """Options as this version writes them, of what an older one wrote.

    That wrote the defaults of options which had no effect.
    """
    values = dict(values)
    if values.get("optimizer") != "sgd" and values.get("momentum") == 0.9:
        values["momentum"] = None
    started = any(values.get(name) for name in ("checkpoint", "weights", "from_scratch"))
    if started and values.get("pretrain_epochs") == 8:
        values["pretrain_epochs"] = None
    return values


def config_from_json(config_type: type[ConfigT], values: dict[str, Any]) -> ConfigT:
    """The options that :meth:`RunConfig.to_json` wrote, in this version or an older one."""
    values = up_to_date(values)
    paths = {name: pathlib.Path(values[name]) for name in _PATHS if values.get(name) is not None}
    return config_type(**{**values, **paths})


def read_config(given: ConfigT, folder: pathlib.Path) -> ConfigT:
    """The options that the run in a folder was started with.

    Args:
      given: the options of this call; those that differ from the defaults must agree with the run,
        but for the devices.
      folder: the run's folder.

    Raises:
      UserError: the folder is not that of a run, its configuration is damaged or of another
        experiment, or an option was given that differs from it.
    """
    path = folder / "config.json"
    try:
        saved = config_from_json(type(given), json.loads(path.read_text()))
    except FileNotFoundError:
        raise UserError(f"{folder} is not a run: it has no config.json.") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged or of another experiment: {error}") from None
    for field in dataclasses.fields(given):
        value = getattr(given, field.name)
        if field.name not in (*given.OF_THE_CALL, "devices") and value not in (
            field.default,
            getattr(saved, field.name),
        ):
            raise UserError(
                f"{field.name} is {getattr(saved, field.name)} in the run {folder}; it cannot be "
                f"changed to {value} on resuming."
            )
    # A run may go on with other devices than it had.
    return saved if given.devices is None else dataclasses.replace(saved, devices=given.devices)
