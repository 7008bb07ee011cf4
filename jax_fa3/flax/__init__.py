"""jax_fa3 in Flax: attention functions for Flax's own layers, and layers of our own.

`linen.MultiHeadAttention` and `nnx.MultiHeadAttention` are the layers. `import jax_fa3` leaves this
package, and Flax, alone.
"""

try:
    import flax as _flax
except ImportError as error:
    raise ImportError("jax_fa3.flax: got no module flax, wanted Flax: pip install flax") from error

from . import linen, nnx
from ._attention_fn import make_attention_fn
from ._layer import PROJECTION_NAMES
from ._mask_to_intervals import mask_to_intervals

__all__ = ["PROJECTION_NAMES", "linen", "make_attention_fn", "mask_to_intervals", "nnx"]
del _flax
