"""Every operation that has a fast form, behind one dispatcher.

Three integer products make a quantized layer. With ``x`` and ``w`` signs and ``Q(g)`` the quantized
gradient of the output (:class:`~fqt_jax.kernels.contract.Rounding`):

===============  ====================  =============================
``forward``      ``z = x * w``         ``int16`` or ``int32``, exact
``input_grad``   ``dx = Q(g) *^T w``   ``float32[N, H, W, C]``
``weight_grad``  ``dw = x * Q(g)``     ``float32[kh, kw, C, O]``
===============  ====================  =============================

A dense layer is a convolution of one position with a 1x1 window. What stands between two products
is :mod:`fqt_jax.kernels.transforms`, or :mod:`fqt_jax.kernels.normed` with a layer norm; what stays
float, :mod:`fqt_jax.kernels.floats` and :mod:`fqt_jax.kernels.attention`; which groups of a
gradient the products take, :mod:`fqt_jax.kernels.draws`. Each is served by several implementations
(:mod:`fqt_jax.kernels.dispatch`), of which ``xla`` has all. They agree exactly on codes and integer
sums, and to a few ulp on float results.
"""

from fqt_jax.kernels import native, packed, pallas, xla
from fqt_jax.kernels.attention import attention as attention
from fqt_jax.kernels.attention import attention_grad as attention_grad
from fqt_jax.kernels.contract import Rounding as Rounding
from fqt_jax.kernels.contract import UnsupportedError as UnsupportedError
from fqt_jax.kernels.contract import Window as Window
from fqt_jax.kernels.dispatch import check_implementation as check_implementation
from fqt_jax.kernels.dispatch import implementations as implementations
from fqt_jax.kernels.dispatch import register
from fqt_jax.kernels.draws import Units as Units
from fqt_jax.kernels.draws import systematic as systematic
from fqt_jax.kernels.draws import water_filling as water_filling
from fqt_jax.kernels.floats import adam as adam
from fqt_jax.kernels.floats import float_conv as float_conv
from fqt_jax.kernels.floats import float_conv_input_grad as float_conv_input_grad
from fqt_jax.kernels.floats import float_conv_weight_grad as float_conv_weight_grad
from fqt_jax.kernels.normed import Normed as Normed
from fqt_jax.kernels.normed import encode_normed as encode_normed
from fqt_jax.kernels.normed import gradient_normed as gradient_normed
from fqt_jax.kernels.products import forward as forward
from fqt_jax.kernels.products import input_grad as input_grad
from fqt_jax.kernels.products import weight_grad as weight_grad
from fqt_jax.kernels.transforms import Flow as Flow
from fqt_jax.kernels.transforms import Line as Line
from fqt_jax.kernels.transforms import Moments as Moments
from fqt_jax.kernels.transforms import activate as activate
from fqt_jax.kernels.transforms import encode as encode
from fqt_jax.kernels.transforms import encode_weights as encode_weights
from fqt_jax.kernels.transforms import finish_weight_grad as finish_weight_grad
from fqt_jax.kernels.transforms import gradient as gradient
from fqt_jax.kernels.transforms import gradient_sums as gradient_sums
from fqt_jax.kernels.transforms import moments as moments
from fqt_jax.kernels.transforms import pooled_shape as pooled_shape

# pallas stands after xla until it was measured against it on a GPU.
register(native.IMPLEMENTATION, xla.IMPLEMENTATION, pallas.IMPLEMENTATION, packed.IMPLEMENTATION)
