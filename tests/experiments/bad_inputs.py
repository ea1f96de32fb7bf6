"""Command lines that cannot be meant, and what each prints: one line that names what is wrong.

python -m tests.experiments.bad_inputs   # the table, as Markdown
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import pathlib
import runpy
import shlex
import sys
import tempfile

import numpy as np
from PIL import Image

CASES: list[tuple[str, str]] = [
    # Names
    ("finetune --dataset cifer10", "unknown data set 'cifer10'"),
    ("finetune --model resnet19", "unknown model 'resnet19'"),
    ("finetune --recipe fqt2", "unknown recipe 'fqt2'"),
    ("finetune --optimizer adamm", "unknown optimizer 'adamm'"),
    ("finetune --implementation cuda", "unknown implementation 'cuda'"),
    ("finetune --sampler dice", "invalid choice 'dice'"),
    ("finetune --schedule linear", "invalid choice 'linear'"),
    ("finetune --epocs 3", "Unrecognized options: --epocs"),
    ("finetune --log mlflow", "invalid choice 'mlflow'"),
    ("pretrain --model lenet", "unknown model 'lenet'"),
    ("speed --model gpt5", "unknown model 'gpt5'"),
    ("speed --recipes fqt9", "unknown recipe 'fqt9'"),
    ("speed --implementations cuda --layers", "unknown implementation 'cuda'"),
    ("time_to_accuracy --contenders torhc", "unknown contender 'torhc'"),
    ("tables --models resnet18:depth=3", "depth"),
    # Numbers
    ("finetune --epochs 0", "epochs must be"),
    ("finetune --epochs many", "Error parsing --epochs: invalid literal"),
    ("finetune --batch-size 0", "batch_size must be"),
    ("finetune --batch-size 5000", "batch_size is 5000, but digits has only"),
    ("finetune --width 0", "width must be"),
    ("finetune --width 1e9", "width must be"),
    ("finetune --width nan", "width must be"),
    ("finetune --image-size 100000", "image_size must be"),
    ("finetune --image-size -1", "image_size must be"),
    ("finetune --bits 9", "bits must be"),
    ("finetune --keep 0", "keep"),
    ("finetune --keep 1.5", "keep"),
    ("finetune --learning-rate -1", "learning_rate must be"),
    ("finetune --learning-rate inf", "learning_rate must be"),
    ("finetune --weight-decay nan", "weight_decay must be"),
    ("finetune --optimizer sgd --momentum 1", "momentum must be"),
    ("finetune --label-smoothing 1", "label_smoothing must be"),
    ("finetune --validation-fraction 1", "validation_fraction must be"),
    ("finetune --limit 0", "limit must be"),
    ("finetune --pad -1", "pad must be"),
    ("finetune --seed -1", "seed must be"),
    ("finetune --seed 5000000000", "seed must be"),
    ("finetune --clip-norm 0", "clip_norm must be"),
    ("finetune --ema-decay 1", "ema_decay must be"),
    ("finetune --warmup-epochs 60", "warmup"),
    ("finetune --patience 0", "patience must be"),
    ("finetune --save-minutes -1", "save_minutes must be"),
    ("speed --threads 100", "threads must be from 1 to"),
    ("speed --repeats 0", "repeats must be at least 1"),
    ("speed --batch-size 0", "batch_size must be at least 1"),
    ("time_to_accuracy --targets 120", "targets must be in (0, 100]"),
    # Options that have no effect, or exclude each other
    ("finetune --momentum 0.5", "momentum"),
    ("finetune --model vgg11 --stem imagenet", "stem has no effect on vgg11"),
    ("finetune --schedule constant --cosine-epochs 5", "cosine"),
    ("finetune --epochs 7 --cosine-epochs 5", "cosine_epochs"),
    ("finetune --recipe qat --bits 4", "the recipe 'qat' does not quantize gradients"),
    ("finetune --recipe psq1 --one-draw", "prunes nothing: one_draw cannot be set"),
    ("finetune --one-draw --sampler bernoulli", "sampler has no effect"),
    ("finetune --one-draw --budget model", "budget has no effect: one_draw draws by the loss"),
    ("finetune --recipe psq1 --budget model", "budget has no effect: nothing is pruned"),
    (
        "finetune --model lstm --budget model --from-scratch --dataset mnist5k",
        "budget='model' cannot count the entries of layer layers/0/",
    ),
    ("finetune --recipe full_precision --diagnose", "diagnose needs a binary recipe"),
    ("finetune --stream yes --pad 2", "pad has no effect"),
    ("finetune --workers 2 --stream no", "workers have no effect"),
    ("finetune --data-dir photos", "data_dir"),
    ("finetune --from-scratch --checkpoint run", "checkpoint"),
    ("finetune --out a --resume b", "give either out"),
    ("speed --plot a.bmp", "plot must end in"),
    ("speed --layers --plot a.png", "plot draws the times of steps"),
    ("finetune --dataset pydoc --from-scratch", "resnet18 takes images, and pydoc is text"),
    ("finetune --model gpt_small --from-scratch", "gpt_small takes text, and digits has images"),
    *(
        (f"finetune --dataset pydoc --model gpt_small --from-scratch --{option}", what)
        for option, what in (
            ("image-size 16", "image_size has no effect on pydoc, which is text"),
            ("flip True", "flip has no effect on pydoc"),
            ("pad 0", "pad has no effect on pydoc"),
            ("stem small", "stem has no effect on pydoc"),
            ("stream yes", "stream has no effect on pydoc"),
            ("workers 2", "workers has no effect on pydoc"),
            ("stratify", "stratify has no effect on pydoc"),
            ("data-dir photos", "pydoc is text that comes with Python: it takes no data_dir"),
            ("batch-size 5000", "has only"),
        )
    ),
    ("finetune --dataset pydoc --model gpt_small", "give a --checkpoint, or --from-scratch"),
    ("finetune --dataset pydoc --model gpt_small --weights a.pth", "weights of others are of"),
    ("gradient_statistics --dataset pydoc", "vgg_small takes images, and pydoc is text"),
    ("estimators --dataset pydoc --model gpt_small --image-size 8", "image_size has no effect on"),
    ("tables --datasets pydoc:from_scratch --models lstm", "goes with none of lstm"),
    ("predict a.safetensors photos/a/0.png --prompt for", "give either images, or a --prompt"),
    ("speed --model lstm", "unknown model 'lstm'"),
    ("speed --model gpt_small --image-size 64", "image_size has no effect on gpt_small"),
    ("speed --length 64", "length has no effect on vgg16"),
    ("speed --model vit_small --image-size 30", "image_size must be a multiple of 4"),
    # Patterns and files
    ("finetune --from-scratch --freeze head[", "freeze"),
    ("finetune --from-scratch --freeze tail.*", "freeze"),
    ("finetune --dataset folder", "data_dir"),
    ("finetune --dataset folder --data-dir nowhere --from-scratch", "nowhere is not there"),
    ("finetune --dataset folder --data-dir empty --from-scratch", "empty"),
    ("finetune --dataset folder --data-dir photos --from-scratch", "photos/b/broken.png"),
    ("finetune --dataset npz --data-dir text.npz --from-scratch", "text.npz"),
    ("finetune --dataset npz --data-dir labels.npz --from-scratch", "labels.npz"),
    ("finetune --dataset cifar10 --from-scratch --data-dir empty", "cifar10 is not prepared"),
    ("finetune --weights nowhere.pth", "nowhere.pth is not there"),
    ("finetune --checkpoint nowhere", "nowhere"),
    ("finetune --out full --from-scratch", "full"),
    ("finetune --out text.npz --from-scratch", "text.npz"),
    ("finetune --resume nowhere", "nowhere is not a run"),
    ("finetune --resume empty", "empty is not a run"),
    ("finetune --resume damaged", "config.json is damaged"),
    ("finetune --config nowhere.json", "nowhere.json: No such file"),
    ("finetune --config text.npz", "text.npz is no JSON"),
    ("finetune --config typo.json", "unknown option 'epoch'; did you mean epochs?"),
    ("finetune --config wrong.json", "epochs must be int"),
    ("report nowhere", "nowhere"),
    ("report damaged", "damaged"),
    ("predict nowhere.safetensors photos/a/0.png", "nowhere.safetensors is not there"),
    ("predict text.npz photos/a/0.png", "text.npz is no safetensors file"),
    ("export nowhere", "Missing from python -m experiments.export"),
    ("export nowhere --out a.safetensors", "nowhere"),
    ("speed --json nowhere/a.json", "nowhere/a.json: No such file"),
]
"""Arguments, and what the line has in it."""


def make_files(folder: pathlib.Path) -> None:
    """The files that the command lines name."""
    (folder / "empty").mkdir()
    (folder / "full").mkdir()
    (folder / "full" / "notes.txt").write_text("mine")
    (folder / "damaged").mkdir()
    (folder / "damaged" / "config.json").write_text("{")
    (folder / "text.npz").write_text("not an archive")
    np.savez(folder / "labels.npz", labels=np.arange(5))
    (folder / "typo.json").write_text('{"epoch": 3}')
    (folder / "wrong.json").write_text('{"epochs": "3"}')
    for name in ("a", "b"):
        (folder / "photos" / name).mkdir(parents=True)
        for i in range(10):
            image = np.full((8, 8, 3), 20 * i, np.uint8)
            Image.fromarray(image).save(folder / "photos" / name / f"{i}.png")
    (folder / "photos" / "b" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n damaged")


def run(arguments: str) -> tuple[int, str]:
    """The exit status and the standard error of one command line, run in this process."""
    name, *options = shlex.split(arguments)
    module = f"experiments.{name}"
    importlib.import_module(module)
    errors = io.StringIO()
    before, before_main = sys.argv, sys.modules["__main__"]
    sys.argv = [name, *options]
    status = 0
    try:
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
            runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    finally:
        sys.argv, sys.modules["__main__"] = before, before_main
    return status, errors.getvalue()


def lines_of(text: str) -> list[str]:
    """What was printed, without the frame that the parser of options draws."""
    return [line.strip("╭╮╰╯│─ ") for line in text.splitlines() if line.strip("╭╮╰╯│─ ")]


def main() -> None:
    """Prints the table."""
    print("| command line | prints | status |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        make_files(pathlib.Path(folder))
        for arguments, _ in CASES:
            status, text = run(arguments)
            line = " / ".join(lines_of(text)).replace("|", "\\|")
            print(f"| `{arguments}` | {line} | {status} |", flush=True)


if __name__ == "__main__":
    main()
