import json
import os
import pathlib
import signal

import pytest

from experiments import cli
from experiments.finetune import FinetuneConfig, main
from experiments.runs import diagnosis

pytestmark = pytest.mark.usefixtures("relaxed_promotion", "own_folder", "tiny_vgg")


def tiny(out: str, **changes) -> FinetuneConfig:
    options = {
        "model": "vgg_small",
        "width": 0.25,
        "image_size": 8,
        "limit": 96,
        "batch_size": 32,
        "epochs": 2,
        "learning_rate": 1e-3,
        "from_scratch": True,
        "diagnose": True,
        "out": pathlib.Path(out),
    }
    return FinetuneConfig(**{**options, **changes})


def lines(folder: str) -> list[dict]:
    return [
        json.loads(line) for line in pathlib.Path(folder, "metrics.jsonl").read_text().splitlines()
    ]


@pytest.mark.slow
def test_a_diagnosed_run_trains_and_resumes_as_one_that_is_not(monkeypatch, capsys):
    main(tiny("plain", diagnose=False))
    capsys.readouterr()
    main(tiny("whole"))
    printed = capsys.readouterr().out
    assert printed.count("noise / signal of the quantized layers' gradient") == 2
    assert printed.count("arXiv 2505.19115") == 1
    assert pathlib.Path("whole/diagnosis.png").read_bytes().startswith(b"\x89PNG")
    whole = lines("whole")
    found = [line.pop("diagnosis") for line in whole]
    assert whole == lines("plain")
    flips = [value for name, value in found[0].items() if name.endswith("sign_flip_ratio")]
    assert len(flips) == 1  # of one quantized layer
    assert all(0 < ratio < 1 for ratio in flips)
    assert found[0] != found[1]

    original = diagnosis.Diagnosis.after_epoch

    def interrupting(self, state):
        os.kill(os.getpid(), signal.SIGINT)
        return original(self, state)

    with monkeypatch.context() as patch:
        patch.setattr(diagnosis.Diagnosis, "after_epoch", interrupting)
        with pytest.raises(cli.Interrupted):
            main(tiny("stopped"))
    main(FinetuneConfig(resume=pathlib.Path("stopped")))
    assert lines("stopped") == lines("whole")


def test_a_float_recipe_has_nothing_to_diagnose():
    with pytest.raises(cli.UserError, match="diagnose needs a binary recipe"):
        main(tiny("run", recipe="full_precision"))
