"""Fine-tunes a model with 1-bit weights, activations and gradients.

    python -m experiments.finetune --dataset digits --model resnet18 --recipe fqt1

Starts from a checkpoint of experiments.pretrain. Where none is given, it pretrains on mnist5k
once and keeps the result for later runs.
"""

from experiments import cli
from experiments.runs.finetuning import FinetuneConfig, main

if __name__ == "__main__":
    cli.run(main, FinetuneConfig)
