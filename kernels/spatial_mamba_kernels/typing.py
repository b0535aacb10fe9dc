"""Array annotations, e.g. `Float[Array, "B L D"]`.

They are jaxtyping's where it is installed, and the tests check them at run
time. Elsewhere they mean just "an array": these kernels need nothing but JAX.
"""

from typing import TYPE_CHECKING, Any

from jax import Array

__all__ = ["Array", "Float", "Int", "Shaped", "Size"]

# Of an axis: an int, or a symbol where `jax.export` leaves it open.
Size = Any

if TYPE_CHECKING:
  from jaxtyping import Float, Int, Shaped
else:
  try:
    from jaxtyping import Float, Int, Shaped
  except ImportError:

    class _AnyArray:
      def __class_getitem__(cls, item):
        array_type, _ = item
        return array_type

    Float = Int = Shaped = _AnyArray
