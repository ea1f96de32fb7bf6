"""C++ kernels for the CPU, called through XLA's foreign function interface."""

from fqt_jax.kernels.dispatch import Implementation
from fqt_jax.kernels.native.calls import KERNELS
from fqt_jax.kernels.native.calls import product_form as product_form
from fqt_jax.kernels.native.library import call as call
from fqt_jax.kernels.native.library import instruction_set as instruction_set
from fqt_jax.kernels.native.library import unavailable as unavailable

IMPLEMENTATION = Implementation("native", KERNELS, lambda: ("cpu",), unavailable)
