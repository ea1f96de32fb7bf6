"""Weights that others trained: files of PyTorch, safetensors and Keras, into these models."""

from fqt_jax.weights.files import WeightsError as WeightsError
from fqt_jax.weights.files import read as read
from fqt_jax.weights.loading import Loaded as Loaded
from fqt_jax.weights.loading import LoadTable as LoadTable
from fqt_jax.weights.loading import load as load
from fqt_jax.weights.loading import statistics as statistics
