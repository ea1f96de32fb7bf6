"""Variances of the quantized gradient and bounds on regret, as functions.

Each is derived step by step in ``docs/theory.md``.
"""

from fqt_jax.theory.regret import (
    amsgrad_bounded_noise_regret_bound as amsgrad_bounded_noise_regret_bound,
)
from fqt_jax.theory.regret import amsgrad_regret_bound as amsgrad_regret_bound
from fqt_jax.theory.regret import sgd_regret_bound as sgd_regret_bound
from fqt_jax.theory.regret import tuned_sgd_regret_bound as tuned_sgd_regret_bound
from fqt_jax.theory.sampling import group_probabilities as group_probabilities
from fqt_jax.theory.sampling import sampled_sum_variance as sampled_sum_variance
from fqt_jax.theory.variance import GradientError as GradientError
from fqt_jax.theory.variance import agp_bound as agp_bound
from fqt_jax.theory.variance import gradient_error as gradient_error
from fqt_jax.theory.variance import per_sample_bound as per_sample_bound
from fqt_jax.theory.variance import per_tensor_bound as per_tensor_bound
from fqt_jax.theory.variance import published_agp_bound as published_agp_bound
from fqt_jax.theory.variance import rounding_variance as rounding_variance
