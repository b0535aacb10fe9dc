"""First weights do not depend on how few programs draw them."""

import jax
import numpy as np
import pytest
from flax import nnx

import spatial_mamba_jax as smj
from spatial_mamba_jax.models import initializers
from spatial_mamba_jax.models.mixers.selective import dt_bias

INITIALIZERS = {
  "normal": initializers.normal(0.02),
  "uniform": initializers.uniform(-0.3, 0.5),
  "dt_bias": dt_bias,
}
# Also at and beyond the sizes that are drawn.
SHAPES = ((), (3, 5, 7), (4096,), (4097,), (2**22 + 1,))


@pytest.mark.parametrize("name", INITIALIZERS)
def test_a_draw_is_that_of_its_shape(name):
  init = INITIALIZERS[name]
  for shape in SHAPES:
    key = jax.random.key(len(shape))
    drawn = init(key, shape, "float32")
    assert isinstance(drawn, jax.Array)
    assert (drawn.shape, drawn.dtype.name) == (shape, "float32")
    # Within a program the factors of a normal number are one.
    expected = jax.jit(lambda key, shape=shape: init(key, shape, "float32"))(
      key
    )
    np.testing.assert_allclose(drawn, expected, rtol=3e-7)


def test_streams_give_the_keys_of_flax():
  def keys(make):
    rngs = make(3)
    return jax.random.key_data(
      jax.numpy.stack([rngs.params(), rngs(), rngs.drop_path()])
    )

  expected = keys(nnx.Rngs)
  np.testing.assert_array_equal(keys(initializers.Streams), expected)
  traced = jax.jit(lambda: keys(initializers.Streams))()
  np.testing.assert_array_equal(traced, expected)


def test_a_model_is_drawn_by_few_programs(caplog):
  """Else the first model of a process takes half a minute."""
  jax.clear_caches()
  with jax.log_compiles():
    smj.create_model("spatial_mamba_micro", rngs=nnx.Rngs(0))
  compiled = [x for x in caplog.messages if x.startswith("Compiling ")]
  assert 5 <= len(compiled) <= 20
