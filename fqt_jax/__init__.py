"""1-bit fully quantized training for JAX and Flax (arXiv 2408.14267)."""

from fqt_jax import diagnostics as diagnostics
from fqt_jax import estimators as estimators
from fqt_jax import samplers as samplers
from fqt_jax import theory as theory
from fqt_jax import training as training
from fqt_jax import weights as weights
from fqt_jax._versions import warn_of_defects as _warn_of_defects
from fqt_jax.attention import self_attention as self_attention
from fqt_jax.binarize import PackedBits as PackedBits
from fqt_jax.binarize import binarize as binarize
from fqt_jax.binarize import weight_scale as weight_scale
from fqt_jax.calibration import SignTable as SignTable
from fqt_jax.calibration import calibrate as calibrate
from fqt_jax.calibration import calibrate_norms as calibrate_norms
from fqt_jax.calibration import sign_balance as sign_balance
from fqt_jax.convert import Conversion as Conversion
from fqt_jax.convert import ConversionTable as ConversionTable
from fqt_jax.convert import quantize as quantize
from fqt_jax.functional import conv as conv
from fqt_jax.functional import dense as dense
from fqt_jax.functional import product as product
from fqt_jax.kernels import implementations as implementations
from fqt_jax.layers import QuantConv as QuantConv
from fqt_jax.layers import QuantConvTranspose as QuantConvTranspose
from fqt_jax.layers import QuantEinsum as QuantEinsum
from fqt_jax.layers import QuantLinear as QuantLinear
from fqt_jax.layers import QuantLinearGeneral as QuantLinearGeneral
from fqt_jax.pruning import prune as prune
from fqt_jax.recipe import FQT1 as FQT1
from fqt_jax.recipe import FQT1_PLUS as FQT1_PLUS
from fqt_jax.recipe import FULL_PRECISION as FULL_PRECISION
from fqt_jax.recipe import PSQ1 as PSQ1
from fqt_jax.recipe import QAT as QAT
from fqt_jax.recipe import QAT_ACTIVATIONS as QAT_ACTIVATIONS
from fqt_jax.recipe import RECIPES as RECIPES
from fqt_jax.recipe import GradientQuantizer as GradientQuantizer
from fqt_jax.recipe import Recipe as Recipe
from fqt_jax.recipe import recipe_by_name as recipe_by_name
from fqt_jax.rounding import stochastic_round as stochastic_round
from fqt_jax.samplers import SAMPLERS as SAMPLERS
from fqt_jax.samplers import Sampler as Sampler
from fqt_jax.samplers import keep_probabilities as keep_probabilities
from fqt_jax.selection import Selection as Selection
from fqt_jax.sequential import Sequential as Sequential

__version__ = "0.1.0"

_warn_of_defects()
