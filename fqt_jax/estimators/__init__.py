"""Estimators of the gradient of a batch's mean loss: what a training step asks for gradients.

Each is an object with one method, :meth:`Estimator.gradients`, in a file of its own. Another one
is a third such object; :func:`fqt_jax.training.make_train_step` takes any.
"""

from fqt_jax.estimators.base import Estimator as Estimator
from fqt_jax.estimators.base import Gradients as Gradients
from fqt_jax.estimators.base import SplitModel as SplitModel
from fqt_jax.estimators.full_batch import FullBatch as FullBatch
from fqt_jax.estimators.one_draw import OneDraw as OneDraw
