"""What GPU kernels send to device memory stays where it belongs.

Pallas copies a slice that lies in one piece without regard to where the array's
dimensions end, which neither its interpreter nor a compiler sees.
"""

import math
import types
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from spatial_mamba_kernels.gpu import device as gpu_device


@pytest.fixture
def sent(monkeypatch):
  """(operator, arrays) -> [(shape of an array, that of what is sent to it)]."""

  def by_kernels(operator, arrays):
    targets = []

    def copy(source, target, **options):
      targets.append(target)
      original(source, target, **options)

    def run(arrays):
      kernel = partial(operator, implementation="mosaic_gpu")
      y, pullback = jax.vjp(lambda arrays: kernel(**arrays), arrays)
      return pullback(y)

    original = plgpu.copy_smem_to_gmem
    hopper = types.SimpleNamespace(compute_capability="9.0")
    with monkeypatch.context() as patch:
      patch.setattr(gpu_device, "get_default_device", lambda: hopper)
      patch.setattr(plgpu, "copy_smem_to_gmem", copy)
      jax.clear_caches()
      jax.make_jaxpr(run)(arrays)
    jax.clear_caches()
    return [(target.ref.shape, slice_shape(target)) for target in targets]

  return by_kernels


def slice_shape(target):
  """With 1 for the dimensions of an array that were indexed."""
  sizes = list(target.ref.shape)
  left = list(range(len(sizes)))
  for indexer in target.transforms:
    for place, index in zip(list(left), indexer.indices, strict=True):
      if isinstance(index, pl.Slice):
        sizes[place] = index.size
      else:
        sizes[place] = 1
        left.remove(place)
  return tuple(sizes)


def goes_astray(shape, part):
  """Whether it is one piece of memory, some of it beyond a dimension's end."""
  strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
  expected = [math.prod(part[i + 1 :]) for i in range(len(part))]
  numbers = zip(shape, part, strides, expected, strict=True)
  if any(size > 1 and a != b for _, size, a, b in numbers):
    return False
  return any(
    whole % size for whole, size in zip(shape, part, strict=True) if size > 1
  )


def test_what_goes_astray():
  assert goes_astray((2, 25, 1, 128), (1, 16, 1, 128))
  assert not goes_astray((2, 32, 1, 128), (1, 16, 1, 128))
  assert goes_astray((2, 25, 96), (1, 1, 128))
  # Of several pieces, the TMA leaves out what is beyond.
  assert not goes_astray((2, 25, 96), (1, 16, 128))
  assert not goes_astray((2, 25, 256), (1, 16, 128))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
  "shape",
  [
    # No whole number of tiles, of 16, 5 or 1 tokens.
    *((2, 5, 5, 128, 1), (2, 5, 5, 100, 1), (2, 7, 7, 128, 3)),
    *((2, 5, 5, 96, 16), (2, 5, 5, 192, 9), (2, 5, 5, 96, 1)),
    # One column.
    *((2, 7, 1, 96, 1), (1, 1, 1, 192, 1), (64, 7, 1, 96, 1), (1, 1, 1, 1, 1)),
  ],
  ids=str,
)
def test_ssm(every_operator, sent, shape, dtype):
  states = shape[-1]
  for place, (operator, arrays) in enumerate(
    every_operator(*shape, images=dtype)
  ):
    if place == 0 and states > 1:
      continue  # It has one state a channel.
    copies = sent(operator, arrays)
    assert copies
    assert not [copy for copy in copies if goes_astray(*copy)]


@pytest.mark.parametrize(
  "shape",
  # No whole number of segments; one; fewer channels than are copied.
  [(2, 25, 128, 1), (2, 25, 100, 3), (1, 7, 192, 16), (2, 1, 96, 1)],
  ids=str,
)
def test_selective_ssm(scan_read_out, sent, shape):
  copies = sent(*scan_read_out(*shape, images=jnp.bfloat16))
  assert copies
  assert not [copy for copy in copies if goes_astray(*copy)]


@pytest.mark.parametrize("form", ["plain", "residual", "silu", "projected"])
@pytest.mark.parametrize(
  "shape",
  [(2, 7, 1, 96), (1, 1, 1, 192), (2, 5, 3, 96), (1, 1, 1, 1)],
  ids=str,
)
def test_convolution(convolution, sent, shape, form):
  copies = sent(*convolution(shape, jnp.bfloat16, form))
  assert copies
  assert not [copy for copy in copies if goes_astray(*copy)]
