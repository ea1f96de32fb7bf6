"""Fine-tuning: its options, and where it starts."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import pathlib
from typing import Any, ClassVar

import jax

from experiments import cli, distributed, process
from experiments.data import Dataset
from experiments.runs import devices, folders, locks, logs, reporting, runner, tasks
from experiments.runs.config import RunConfig
from experiments.runs.kinds import kind_named
from experiments.runs.pretraining import PretrainConfig, newest_pretraining
from experiments.runs.saved_config import read_config
from fqt_jax.checkpoints import latest_checkpoint
from fqt_jax.recipe import QAT

CACHE = pathlib.Path("runs/pretrained")
_NO_PRETRAINING = "with checkpoint, weights or from-scratch nothing is pretrained"


@dataclasses.dataclass(frozen=True)
class FinetuneConfig(RunConfig):
    """Fine-tuning, by default with the paper's optimizer, rates and number of epochs."""

    checkpoint: pathlib.Path | None = None
    """Start from this: the folder of a run, or a checkpoint in it."""
    weights: pathlib.Path | None = None
    """Start from weights of this network that others trained: .safetensors, .pth or .h5, by the
    names of torchvision, timm or Keras; images are normalized as those that they saw."""
    from_scratch: bool = False
    """Start from random values."""
    pretrain_epochs: int | None = None
    """Epochs of pretraining on mnist5k where no start is given; the default is 8."""
    pretrain_seed: int | None = None
    """Seed of that pretraining; the default is the run's own."""
    cache: pathlib.Path = CACHE
    """Where such pretrained models are kept."""

    coordinator: str | None = None
    """HOST:PORT of the first of several processes, where they find each other; under Slurm and
    Kubernetes it is found."""
    processes: int | None = None
    """How many processes there are; 1 is one wherever it runs."""
    process: int | None = None
    """Which of them this one is, from 0 on."""

    DISTRIBUTED: ClassVar[bool] = True
    """The run may have several processes; see :func:`experiments.distributed.start`."""

    NOT_COMPILED: ClassVar[tuple[str, ...]] = (
        *RunConfig.NOT_COMPILED,
        "checkpoint",
        "from_scratch",
        "pretrain_epochs",
        "pretrain_seed",
        "cache",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        starts = (self.checkpoint is not None, self.weights is not None, self.from_scratch)
        if sum(starts) > 1:
            raise cli.UserError("give only one of checkpoint, weights and from-scratch.")
        kind = kind_named(self.dataset)
        if not kind.pretrains and (self.weights is not None or not sum(starts)):
            raise cli.UserError(
                f"{self.dataset} has {kind.samples}, and the pretraining and weights of others are "
                "of images: give a --checkpoint, or --from-scratch."
            )
        if self.pretrain_epochs is not None:
            if sum(starts):
                raise cli.UserError(f"pretrain_epochs has no effect: {_NO_PRETRAINING}.")
            if self.pretrain_epochs < 1:
                raise cli.UserError(
                    f"pretrain_epochs must be at least 1; got {self.pretrain_epochs}."
                )

    def filled_in(self) -> dict[str, Any]:
        found = super().filled_in()
        if not (self.checkpoint or self.weights or self.from_scratch):
            found["pretrain_epochs"] = self.pretrain_epochs or PretrainConfig.epochs
        return found

    def check_pretraining(self) -> None:
        """Checks that there is a pretraining for the options that are about it.

        Sweeps give these to all their runs, and need no such check.

        Raises:
          UserError: the run starts from something else.
        """
        for name, default in (("pretrain_seed", None), ("cache", CACHE)):
            starts = self.checkpoint or self.weights or self.from_scratch
            if starts and getattr(self, name) != default:
                raise cli.UserError(f"{name} has no effect: {_NO_PRETRAINING}.")


def main(config: FinetuneConfig) -> None:
    """Runs the experiment."""
    config.check_pretraining()
    with contextlib.ExitStack() as held:
        folder = config.resume
        if folder is not None:
            config = read_config(config, folder)
            devices.mesh_of(config)
            held.enter_context(folders.continuing(folder, "finetune"))
        else:
            devices.mesh_of(config)  # a check, before data are read
            folders.check_can_start(config)
            if config.weights is not None and not config.weights.is_file():
                raise cli.UserError(f"{config.weights} is not there.")
        logs.check_log(config)
        tasks.check_freeze(config)
        dataset = tasks.load_dataset(config)
        config.check_batch(len(dataset.train))
        task = build_task(config, dataset, folder)
        if folder is None:
            folder = held.enter_context(folders.starting(config, "finetune"))
        print(task.table)
        summary = runner.train(config, task, folder, "finetune")
        reporting.print_summary(summary, folder)


def build_task(config: FinetuneConfig, dataset: Dataset, folder: pathlib.Path | None) -> tasks.Task:
    """Builds the model, at its starting point unless the run in ``folder`` is to be continued."""
    resumable = folder is not None and latest_checkpoint(folder / "checkpoints") is not None
    if config.weights is not None:
        weights = None if resumable else config.weights
        dataset = tasks.normalized_for(dataset, config.weights)
        return tasks.build_task(config, dataset, None, weights)
    start = None if resumable else starting_point(config, dataset)
    return tasks.build_task(config, dataset, start)


def starting_point(config: FinetuneConfig, dataset: Dataset) -> pathlib.Path | None:
    """The checkpoint to start from; pretrains where there is none yet."""
    if config.from_scratch:
        return None
    if config.checkpoint is not None:
        return folders.checkpoint_at(config.checkpoint)
    if dataset.channels != 1:
        raise cli.UserError(
            f"{config.dataset} has colour images and the embedded mnist5k has none: give a "
            "--checkpoint, or --from-scratch."
        )
    return _pretrained(config, dataset)


def pretraining(config: FinetuneConfig, image_size: int) -> PretrainConfig:
    """The pretraining on mnist5k that a fine-tuning starts from.

    Its forward pass is that of the fine-tuning; how gradients are quantized makes no difference.
    Nor does the implementation of the kernels, which is the default one here: the others need not
    serve float gradients, and all of them start from one model. Nor do the devices of one process,
    of which it takes one; several processes pretrain together, on all of theirs.
    """
    recipe = config.build_recipe()
    return PretrainConfig(
        devices=jax.device_count() if distributed.several() else None,
        model=config.model,
        width=config.width,
        stem=config.stem,
        recipe="qat" if recipe.weights == "binary" else "qat_activations",
        scale=None if recipe.scale == QAT.scale else recipe.scale,
        clip=None if recipe.clip == QAT.clip else recipe.clip,
        threshold=None if recipe.threshold == QAT.threshold else recipe.threshold,
        epochs=config.pretrain_epochs or PretrainConfig.epochs,
        image_size=image_size,
        seed=config.seed if config.pretrain_seed is None else config.pretrain_seed,
    )


def _pretrained(config: FinetuneConfig, dataset: Dataset) -> pathlib.Path:
    """A model pretrained on mnist5k, from the cache or made now; a broken-off one is continued.

    Of several runs that want the same one, one makes it and the others wait for it. Of several
    processes of one run the first looks and decides, and all pretrain together.
    """
    options = pretraining(config, dataset.image_size[0])
    with contextlib.ExitStack() as held:
        folder = None
        if distributed.first():
            folder = _newest(options) or _cached(options, config.cache, held)
        folder = distributed.from_first(folder)
        if not folders.finished(folder):
            _pretrain(options, folder)
    print(f"starting from the pretrained model in {folder}")
    return folders.checkpoint_at(folder)


def _newest(options: PretrainConfig) -> pathlib.Path | None:
    """The newest run of experiments.pretrain, if it is what to start from."""
    made, why_not = newest_pretraining(options)
    if made is not None and why_not:
        print(f"{made} is not what to start from: {why_not}; --checkpoint {made} would take it")
    return None if why_not else made


def _cached(
    options: PretrainConfig, cache: pathlib.Path, held: contextlib.ExitStack
) -> pathlib.Path:
    """The folder of a pretraining in the cache, held where it is not finished."""
    # Defaults stay out of the name, so that an option added later renames no folder.
    default = PretrainConfig().to_json()
    values = {k: v for k, v in options.to_json().items() if v != default[k]}
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
    folder = cache / f"{options.model}-mnist5k-{digest[:12]}"
    # A finished one needs no lock: the cache may be one that cannot be written.
    if not folders.finished(folder):
        folder.mkdir(parents=True, exist_ok=True)
        held.enter_context(locks.locked(folder, wait_for=f"pretrains in {folder}"))
    return folder


def _pretrain(options: PretrainConfig, folder: pathlib.Path) -> None:
    print(f"pretraining on mnist5k once; the result is kept in {folder}")
    on_stop = "the same command continues with the pretraining."
    process.if_stopped(on_stop)
    distributed.tell_how_to_go_on(on_stop)
    folders.write_config(options, folder)
    (folder / "summary.json").unlink(missing_ok=True)  # of one whose checkpoint was removed
    task = tasks.build_task(options, tasks.load_dataset(options), None)
    try:
        summary = runner.train(options, task, folder, "pretrain")
    except process.Interrupted:
        raise process.Interrupted(f"stopped and saved; {on_stop}") from None
    reporting.print_summary(summary, folder)
    process.if_stopped("")
