"""Pretrains a binary model with float gradients (QAT) and saves its checkpoint.

python -m experiments.pretrain --dataset mnist5k --model resnet18 --out runs/pretrained
"""

from experiments import cli
from experiments.runs.pretraining import PretrainConfig, main

if __name__ == "__main__":
    cli.run(main, PretrainConfig)
