"""Array annotations, e.g. `Float[Array, "B L D"]`.

They are jaxtyping's if it is installed, and the tests check them at run time.
Otherwise they mean "an array", because these kernels need only JAX.
"""

from typing import TYPE_CHECKING, Any

from jax import Array

__all__ = ["Array", "Float", "Int", "Shaped", "Size"]

# Size of an axis: an int, or a symbolic dimension of `jax.export`.
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
