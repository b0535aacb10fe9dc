"""The GPU kernels on a GPU, against the sequential operators.

Run by `pytest -m gpu tests/kernels/test_on_gpu.py`.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import spatial_mamba_kernels as smk

pytestmark = pytest.mark.gpu

OPERATORS = {"fused": 0, "scan": 1, "fusion": 2}
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
# [B, H, W, D, N] at the four stages of tiny, at stage 1 of base, in images of
# 512 x 512 and 800 x 1280 pixels, and off every size of block, tile and strip.
SHAPES = (
  (64, 56, 56, 128, 1),
  (64, 28, 28, 256, 1),
  (64, 14, 14, 512, 1),
  (64, 7, 7, 1024, 1),
  (64, 56, 56, 192, 1),
  # With fewer images the fused operator is more than one kernel.
  (8, 56, 56, 128, 1),
  (1, 128, 128, 128, 1),
  (1, 200, 320, 128, 1),
  (3, 5, 9, 96, 1),
  (1, 1, 1, 1, 1),
  # Results that are sent to one piece of memory, some beyond the end of tokens
  # or channels.
  (3, 5, 5, 128, 1),
  (2, 7, 1, 96, 1),
  (2, 17, 61, 130, 1),
)
ODD = SHAPES[-1]


@pytest.fixture(autouse=True, scope="session")
def gpu():
  if jax.default_backend() != "gpu":
    reason = f"JAX found no GPU for these tests, only {jax.devices()}"
    pytest.exit(reason, returncode=1)
  # By default a GPU rounds what it multiplies, of float32 numbers, to 11 bits.
  with jax.default_matmul_precision("highest"):
    yield


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernel_is_sequential(
  every_operator, assert_is_sequential, shape, name, dtype
):
  operator, arrays = every_operator(*shape, images=DTYPES[dtype])[
    OPERATORS[name]
  ]
  assert_is_sequential("mosaic_gpu", operator, arrays, DTYPES[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", ["plain", "residual", "silu", "projected"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_convolution(convolution, assert_is_sequential, shape, form, dtype):
  operator, arrays = convolution(shape[:4], DTYPES[dtype], form)
  assert_is_sequential("mosaic_gpu", operator, arrays, DTYPES[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
  "shape",
  [
    (64, 56, 56, 512),
    (64, 28, 28, 1024),
    (64, 14, 14, 2048),
    (3, 27, 9, 96),
    (1, 1, 1, 32),
  ],
  ids=str,
)
def test_convolution_with_a_stride(
  strided_convolution, assert_is_sequential, shape, dtype
):
  operator, arrays = strided_convolution(shape, DTYPES[dtype])
  assert_is_sequential("mosaic_gpu", operator, arrays, DTYPES[dtype])


@pytest.mark.parametrize(
  "shape",
  [
    (64, 56, 56, 64),
    (64, 28, 28, 128),
    (64, 14, 14, 256),
    (64, 56, 56, 96),
    (64, 28, 28, 192),
    (1, 14, 14, 256),
    # Where the weights' cotangents are a kernel's: tiles that programs do not
    # share evenly, and a program with fewer than come at a time.
    (3, 55, 37, 64),
    (3, 29, 37, 128),
    (1, 1, 1, 64),
    (1, 1, 1, 128),
    (3, 5, 9, 32),
    (1, 1, 1, 32),
  ],
  ids=str,
)
def test_mlp(perceptron, assert_is_sequential, shape):
  operator, arrays = perceptron(shape, 4 * shape[-1], jnp.bfloat16)
  assert_is_sequential("mosaic_gpu", operator, arrays, jnp.bfloat16)


@pytest.mark.parametrize("is_gated", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
  "shape",
  [
    (64, 56, 56, 64),
    (64, 56, 56, 128),
    (64, 28, 28, 256),
    (64, 14, 14, 512),
    (64, 7, 7, 1024),
    (64, 14, 14, 768),
    (64, 56, 56, 96),
    (1, 14, 14, 192),
    (3, 5, 9, 32),
    (1, 1, 1, 1024),
  ],
  ids=str,
)
def test_layer_norm(
  normalisation, assert_is_sequential, shape, dtype, is_gated
):
  operator, arrays = normalisation(shape, DTYPES[dtype], is_gated=is_gated)
  assert_is_sequential("mosaic_gpu", operator, arrays, DTYPES[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
  "shape", [(8, 14, 14, 512, 16), (*ODD[:4], 3)], ids=str
)
def test_scan_of_several_states(
  every_operator, assert_is_sequential, shape, dtype
):
  _, scan, _ = every_operator(*shape, images=DTYPES[dtype])
  assert_is_sequential("mosaic_gpu", *scan, DTYPES[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("states", [1, 2, 5, 16])
@pytest.mark.parametrize(
  "shape",
  [
    (64, 3136, 128),
    (64, 196, 512),
    # With fewer images tokens are cut into chunks.
    (1, 3136, 256),
    (3, 45, 96),
    (2, 1037, 130),
    (1, 1, 1),
  ],
  ids=str,
)
def test_selective_ssm(
  scan_read_out, assert_is_sequential, shape, states, dtype
):
  operator, arrays = scan_read_out(*shape, states, images=DTYPES[dtype])
  assert_is_sequential("mosaic_gpu", operator, arrays, DTYPES[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dilations", [(1,), (2, 7)], ids=str)
def test_fusion_of_other_dilations(
  fusion_arguments, assert_is_sequential, dilations, dtype
):
  arrays = fusion_arguments(ODD[:4], dilations, DTYPES[dtype])
  operator = partial(smk.state_fusion, dilations=dilations)
  assert_is_sequential("mosaic_gpu", operator, arrays, DTYPES[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("shape", [SHAPES[2], ODD], ids=str)
def test_none_is_the_kernel(
  every_operator,
  cotangent,
  value_and_gradients,
  shape,
  name,
  dtype,
):
  """Bit for bit."""
  operator, arrays = every_operator(*shape, images=DTYPES[dtype])[
    OPERATORS[name]
  ]
  g = cotangent(operator, arrays)
  kernel = partial(operator, implementation="mosaic_gpu")
  expected = value_and_gradients(kernel, arrays, g)
  actual = value_and_gradients(operator, arrays, g)
  jax.tree.map(np.testing.assert_array_equal, actual, expected)
