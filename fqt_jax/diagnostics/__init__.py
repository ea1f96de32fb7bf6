"""What quantization does to the gradients of a model: to look at in a notebook, or log live.

``layer_gradients`` runs real backward passes of any model and hands out each quantized layer's
gradient; the rest are functions of those. ``diagnose`` puts them together for a training loop.
"""

from fqt_jax.diagnostics.budget import Budget as Budget
from fqt_jax.diagnostics.budget import LayerBudget as LayerBudget
from fqt_jax.diagnostics.budget import budget as budget
from fqt_jax.diagnostics.errors import COMPARED as COMPARED
from fqt_jax.diagnostics.errors import MeasuredError as MeasuredError
from fqt_jax.diagnostics.errors import Quantization as Quantization
from fqt_jax.diagnostics.errors import measured_error as measured_error
from fqt_jax.diagnostics.errors import quantized_gradient as quantized_gradient
from fqt_jax.diagnostics.groups import effective_groups as effective_groups
from fqt_jax.diagnostics.groups import group_ranges as group_ranges
from fqt_jax.diagnostics.groups import lorenz_curve as lorenz_curve
from fqt_jax.diagnostics.groups import sign_flip_ratio as sign_flip_ratio
from fqt_jax.diagnostics.live import STALL_NOISE_TO_SIGNAL as STALL_NOISE_TO_SIGNAL
from fqt_jax.diagnostics.live import diagnose as diagnose
from fqt_jax.diagnostics.live import stall_warning as stall_warning
from fqt_jax.diagnostics.taps import LayerGradient as LayerGradient
from fqt_jax.diagnostics.taps import LayerShape as LayerShape
from fqt_jax.diagnostics.taps import layer_gradients as layer_gradients
from fqt_jax.diagnostics.taps import layer_shapes as layer_shapes
