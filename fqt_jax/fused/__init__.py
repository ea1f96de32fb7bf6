"""The gradient of binary layers: of a chain of any length, of which a single layer is one."""

from fqt_jax.fused.chain import run_chain as run_chain
from fqt_jax.fused.float_conv import float_conv as float_conv
from fqt_jax.fused.general import Multiply as Multiply
from fqt_jax.fused.general import run_product as run_product
from fqt_jax.fused.parts import Chain as Chain
from fqt_jax.fused.parts import Gap as Gap
from fqt_jax.fused.parts import GapParams as GapParams
from fqt_jax.fused.parts import Link as Link
from fqt_jax.fused.parts import Operands as Operands
from fqt_jax.fused.parts import Running as Running
from fqt_jax.fused.parts import Statistics as Statistics
from fqt_jax.fused.parts import Weights as Weights
