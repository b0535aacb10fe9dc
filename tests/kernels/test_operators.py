"""Operators against the authors' numbers and against their own equations."""

from functools import partial

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
import spatial_mamba_kernels as smk
from hypothesis import given, settings
from hypothesis import strategies as st
from spatial_mamba_kernels.depthwise_conv import xla as conv_xla
from spatial_mamba_kernels.selective_scan import reference as scan_reference
from spatial_mamba_kernels.selective_ssm import (
  reference as selective_ssm_reference,
)
from spatial_mamba_kernels.selective_ssm import xla as ssm_xla
from spatial_mamba_kernels.state_fusion import reference as fusion_reference
from spatial_mamba_kernels.state_fusion import xla as fusion_xla
from spatial_mamba_kernels.structure_aware_ssm import reference as ssm_reference

IMPLEMENTATIONS = [None, "sequential", "associative"]
pytestmark = pytest.mark.usefixtures("x64")


def assert_close(actual, expected, tolerance):
  """Holds the largest error against the largest number of a tensor."""
  actual, expected = np.asarray(actual), np.asarray(expected)
  assert actual.shape == expected.shape
  scale = max(np.abs(expected).max(), 1e-30)
  assert np.abs(actual - expected).max() <= tolerance * scale


def channels(numbers):
  """[C] as [1, 1, 1, C]."""
  return numbers[None, None, None]


def with_gradients(function, *arrays, g=jnp.cos):
  """Returns y = f(*arrays), and the cotangents of a cotangent of y.

  One compiled program takes a fraction of the time of its operations.

  Args:
    g: the cotangent of y, or how it is computed from each array of y.
  """

  @jax.jit
  def run(*arrays):
    y, pullback = jax.vjp(function, *arrays)
    return y, pullback(jax.tree.map(g, y) if callable(g) else g)

  return run(*arrays)


def assert_trees_close(actual, expected, tolerance):
  for a, e in zip(
    jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True
  ):
    assert_close(a, e, tolerance)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", ["scan1", "scan3"])
def test_selective_scan_is_the_authors(golden, case, implementation):
  g = {
    k.removeprefix(f"{case}_"): jnp.asarray(v)
    for k, v in golden("ops").items()
    if k.startswith(case)
  }

  def scan(u, delta, A, B, delta_bias):  # In PyTorch's layout.
    h = smk.selective_scan(
      u.mT,
      delta.mT,
      A,
      B.mT,
      delta_bias=delta_bias,
      implementation=implementation,
    )
    return jnp.moveaxis(h, 1, 3)

  arguments = ("u", "delta", "A", "B", "delta_bias")
  arrays = [g[k] for k in arguments]
  h, gradients = with_gradients(scan, *arrays, g=g["dh"])
  assert_close(h, g["h"], 1e-10)
  for name, gradient in zip(arguments, gradients, strict=True):
    assert_close(gradient, g["d" + name], 1e-10)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_state_fusion_is_the_authors(golden, implementation):
  g = {k: jnp.asarray(v) for k, v in golden("ops").items()}

  def fuse(h, kernel_3, kernel_3_1, kernel_3_2, alpha):
    kernels = jnp.stack([kernel_3, kernel_3_1, kernel_3_2])[:, :, 0]
    y = smk.state_fusion(
      jnp.moveaxis(h, 1, 3),
      kernels.transpose(0, 2, 3, 1),
      alpha,
      implementation=implementation,
    )
    return jnp.moveaxis(y, 3, 1)

  arguments = ("h", "kernel_3", "kernel_3_1", "kernel_3_2", "alpha")
  arrays = [g["fusion_" + k] for k in arguments]
  y, gradients = with_gradients(fuse, *arrays, g=g["fusion_dy"])
  assert_close(y, g["fusion_y"], 1e-10)
  for name, gradient in zip(arguments, gradients, strict=True):
    assert_close(gradient, g["fusion_d" + name], 1e-10)


# On the CPU, None is "sequential".
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS[1:])
@settings(max_examples=5, deadline=None, derandomize=True)
@given(
  st.integers(1, 3),
  st.integers(1, 12),
  st.integers(1, 12),
  st.integers(1, 5),
  st.integers(1, 4),
)
def test_ssm_of_any_shape(
  ssm_arguments, implementation, batch, height, width, channels, n
):
  arguments = ssm_arguments(
    batch, height, width, channels, n, images=jnp.float64
  )
  (y, gradients), (expected, expected_gradients) = [
    with_gradients(lambda a, op=op: op(**a), arguments)
    for op in (
      partial(smk.structure_aware_ssm, implementation=implementation),
      ssm_reference.structure_aware_ssm,
    )
  ]
  assert_close(y, expected, 1e-12)
  assert_trees_close(gradients, expected_gradients, 1e-11)


# A sum of some 1000 terms in float32; bfloat16 rounds u and y to 2**-9.
@pytest.mark.parametrize(
  ("dtype", "tolerance"), [(jnp.float32, 1e-5), (jnp.bfloat16, 2**-7)]
)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS[1:])
def test_ssm_in_lower_precision(
  ssm_arguments, implementation, dtype, tolerance
):
  arguments = ssm_arguments(2, 9, 13, 8, 2, images=dtype)
  wide = jax.tree.map(lambda x: x.astype(jnp.float64), arguments)

  def op(**a):
    return smk.structure_aware_ssm(**a, implementation=implementation)

  def cotangent(y):
    return jnp.cos(y.astype(jnp.float64)).astype(y.dtype)

  y, (gradients,) = with_gradients(lambda a: op(**a), arguments, g=cotangent)
  assert y.dtype == dtype
  expected, (wanted,) = with_gradients(
    lambda a: ssm_reference.structure_aware_ssm(**a), wide
  )
  assert_close(y.astype(jnp.float64), expected, tolerance)
  for name, gradient in gradients.items():
    assert gradient.dtype == arguments[name].dtype
    # The cosine of a rounded y moves by y's own rounding, which has y's scale.
    assert_close(gradient.astype(jnp.float64), wanted[name], 20 * tolerance)


def test_state_is_float32_for_half_inputs():
  """27 unit taps over a state of 5000 overflow half precision alone."""
  one = jnp.ones((1, 4, 4, 1), jnp.float16)
  y = smk.structure_aware_ssm(
    one * 5000,
    one,
    jnp.full((1, 1), -1e-6, jnp.float32),
    one,
    one * 1e-3,
    jnp.zeros(1, jnp.float32),
    jnp.ones((3, 3, 3, 1), jnp.float32),
    jnp.ones(3, jnp.float32),
  )
  assert jnp.isfinite(y).all()
  tokens = one.reshape(1, 16, 1)
  states = smk.selective_scan(
    tokens,
    tokens,
    -jnp.ones((1, 2), jnp.float32),
    jnp.ones((1, 16, 2), jnp.float16),
  )
  assert states.dtype == jnp.float32
  assert states.shape == (1, 16, 1, 2)


@pytest.mark.parametrize("n", [1, 5])
def test_every_state_is_scanned_and_fused(ssm_arguments, n):
  """The authors' code crashes beyond one state; here N states are N sums."""
  arguments = ssm_arguments(2, 6, 5, 4, n, images=jnp.float64)
  skip = arguments.pop("D")
  op = jax.jit(smk.structure_aware_ssm)
  y = op(**arguments, D=skip)
  single = []
  for i in range(n):
    one = {
      **arguments,
      "A": arguments["A"][:, i : i + 1],
      "B": arguments["B"][..., i : i + 1],
      "C": arguments["C"][..., i : i + 1],
    }
    single.append(op(**one, D=jnp.zeros_like(skip)))
  assert_close(y, sum(single) + channels(skip) * arguments["u"], 1e-12)


def test_dilations_can_be_chosen():
  rng = np.random.default_rng(0)
  h = jnp.asarray(rng.standard_normal((2, 6, 7, 3)))
  kernels = jnp.asarray(rng.standard_normal((2, 3, 3, 3)))
  alpha = jnp.asarray(rng.standard_normal(2))
  y = smk.state_fusion(h, kernels, alpha, dilations=(2, 4))
  expected = fusion_reference.state_fusion(h, kernels, alpha, dilations=(2, 4))
  assert_close(y, expected, 1e-13)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(
  st.integers(1, 9), st.integers(1, 9), st.integers(1, 4), st.integers(1, 3)
)
def test_depthwise_conv_is_a_grouped_convolution(
  height, width, channels, stride
):
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.standard_normal((2, height, width, channels)))
  kernel = jnp.asarray(rng.standard_normal((3, 3, channels)))

  def grouped(x, kernel):
    return jax.lax.conv_general_dilated(
      x,
      kernel[:, :, None],
      (stride, stride),
      ((1, 1), (1, 1)),
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
      feature_group_count=channels,
    )

  conv = partial(smk.depthwise_conv, stride=stride)
  y, gradients = with_gradients(conv, x, kernel)
  expected, expected_gradients = with_gradients(grouped, x, kernel)
  assert_close(y, expected, 1e-13)
  assert_trees_close(gradients, expected_gradients, 1e-12)


@pytest.mark.parametrize("form", ["residual", "silu", "projected"])
def test_what_a_depthwise_conv_is_part_of(convolution, form):
  operator, arrays = convolution((2, 5, 4, 3), jnp.float64, form)

  (y, gradients), (expected, expected_gradients) = [
    with_gradients(
      lambda arrays, name=name: operator(**arrays, implementation=name), arrays
    )
    for name in (None, "sequential")
  ]
  assert_trees_close(y, expected, 1e-13)
  assert_trees_close(gradients, expected_gradients, 1e-12)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(
  st.integers(1, 9), st.integers(1, 9), st.integers(1, 4), st.integers(2, 4)
)
def test_relu_depthwise_conv_is_its_parts(height, width, channels, stride):
  rng = np.random.default_rng(0)
  # Whole numbers, of which some sums are 0.
  x = jnp.asarray(rng.integers(-3, 4, (2, height, width, channels)), float)
  bias = jnp.asarray(rng.integers(-1, 2, channels), float)
  kernel = jnp.asarray(rng.standard_normal((3, 3, channels)))

  def parts(x, bias, kernel):
    rectified = jax.nn.relu(x + bias[None, None, None])
    return smk.depthwise_conv(rectified, kernel, stride=stride)

  operator = partial(smk.relu_depthwise_conv, stride=stride)
  y, gradients = with_gradients(operator, x, bias, kernel)
  expected, expected_gradients = with_gradients(parts, x, bias, kernel)
  assert_close(y, expected, 1e-14)
  assert_trees_close(gradients, expected_gradients, 1e-13)


def test_relu_depthwise_conv_of_mixed_types():
  x = jnp.ones((2, 3, 5, 4), jnp.bfloat16)
  bias, kernel = jnp.ones(4, jnp.float32), jnp.ones((3, 3, 4), jnp.float32)
  operator = partial(smk.relu_depthwise_conv, stride=2)
  y, pullback = jax.vjp(operator, x, bias, kernel)
  assert (y.shape, y.dtype) == ((2, 2, 3, 4), x.dtype)
  cotangents = [g.dtype for g in pullback(y)]
  assert cotangents == [x.dtype, bias.dtype, kernel.dtype]
  with pytest.raises(ValueError, match=r"bias must have shape \[D\]"):
    operator(x, bias[:3], kernel)
  with pytest.raises(ValueError, match="stride must be 2 or more, not 1"):
    smk.relu_depthwise_conv(x, bias, kernel, stride=1)
  with pytest.raises(NotImplementedError, match="no kernel mosaic_gpu"):
    smk.depthwise_conv(x, kernel, stride=2, implementation="mosaic_gpu")


def test_a_cpu_slices_the_weights_of_a_loop_apart_from_their_products():
  """Together they are not vectorised; see `stencil`."""

  def convolve(x, kernels):
    def step(x, kernel):
      return smk.depthwise_conv(x, kernel), None

    return jax.lax.scan(step, x, kernels)[0]

  x, kernels = jnp.ones((2, 9, 9, 8)), jnp.ones((4, 3, 3, 8))
  program = jax.jit(convolve).lower(x, kernels).compile().as_text()
  computations = [
    computation
    for computation in program.split("\n\n")
    if "multiply(" in computation
  ]
  assert computations
  assert not any("dynamic-slice(" in each for each in computations)


def test_an_mlp_is_its_equation():
  rng = np.random.default_rng(0)
  image = 2, 3, 5, 7
  shapes = (image, (7, 11), (11,), (11, 7), (7,), image)
  arrays = [jnp.asarray(rng.standard_normal(shape)) for shape in shapes]
  branch_scale = jnp.asarray([0, 1.25])

  def mlp(*arrays):
    *arrays, residual = arrays
    return smk.mlp(*arrays, residual=residual, branch_scale=branch_scale)

  def equation(x, w1, b1, w2, b2, residual):
    h = x @ w1 + channels(b1)
    branch = h * jax.scipy.stats.norm.cdf(h) @ w2 + channels(b2)
    return residual + branch_scale[:, None, None, None] * branch

  y, gradients = with_gradients(mlp, *arrays)
  expected, expected_gradients = with_gradients(equation, *arrays)
  assert_close(y, expected, 1e-14)
  assert_trees_close(gradients, expected_gradients, 1e-13)
  x, *weights, residual = arrays
  half = mlp(x.astype(jnp.bfloat16), *weights, residual.astype(jnp.bfloat16))
  assert half.dtype == jnp.bfloat16
  # A branch that is dropped does not matter, whatever is in it.
  dropped = mlp(x.at[0].set(jnp.nan), *weights, residual)
  assert_close(dropped, expected, 1e-14)
  with pytest.raises(NotImplementedError, match="mlp has no kernel mosaic_tpu"):
    smk.mlp(x, *weights, residual=residual, implementation="mosaic_tpu")
  with pytest.raises(ValueError, match=r"w2 must have shape \[F, C\]"):
    mlp(x, *weights[:2], weights[2].T, *weights[3:], residual)


def test_normalisations_are_their_equations():
  rng = np.random.default_rng(0)
  image = 2, 3, 5, 7
  shapes = image, (7,), (7,), image
  *arrays, gate = (jnp.asarray(rng.standard_normal(shape)) for shape in shapes)
  branch_scale = jnp.asarray([0, 1.25])

  def equation(x, scale, bias):
    centred = x - x.mean(-1, keepdims=True)
    var = jnp.square(centred).mean(-1, keepdims=True)
    y = centred / jnp.sqrt(var + 1e-5)
    return x, y * channels(scale) + channels(bias)

  def gated_equation(x, scale, bias, gate):
    _, y = equation(x, scale, bias)
    factor = branch_scale[:, None, None, None]
    return factor * y * gate / (1 + jnp.exp(-gate))

  def gated(*arrays):
    return smk.gated_layer_norm(*arrays, branch_scale)

  for operator, expected, inputs in (
    (smk.residual_layer_norm, equation, arrays),
    (gated, gated_equation, [*arrays, gate]),
  ):
    y, gradients = with_gradients(operator, *inputs)
    wanted, wanted_gradients = with_gradients(expected, *inputs)
    assert_trees_close(y, wanted, 1e-14)
    assert_trees_close(gradients, wanted_gradients, 1e-13)
  # A branch that is dropped does not matter, whatever is in it.
  x, *parameters = arrays
  dropped = gated(x.at[0].set(jnp.nan), *parameters, gate)
  assert_close(dropped, gated(*arrays, gate), 1e-14)
  # Of any mixture of types the result is in that of x.
  half = x.astype(jnp.bfloat16)
  y, pullback = jax.vjp(gated, half, *parameters, gate)
  cotangents = [g.dtype for g in pullback(y)]
  assert cotangents == [y.dtype, *(x.dtype for x in parameters), gate.dtype]
  assert y.dtype == half.dtype
  with pytest.raises(ValueError, match=r"gate must have shape \[B, H, W, C\]"):
    gated(*arrays, gate[0])


def test_what_a_tpu_is_given_is_the_same():
  """The grouped convolutions, lowered here for the CPU."""
  rng = np.random.default_rng(0)
  h = jnp.asarray(rng.standard_normal((2, 4, 9, 2, 3)))
  kernels = jnp.asarray(rng.standard_normal((3, 3, 3, 3)))
  alpha = jnp.asarray(rng.standard_normal(3))
  y = fusion_xla.grouped(
    h, alpha[:, None, None, None] * kernels, dilations=(1, 3, 5)
  )
  for n in range(2):
    expected = jax.jit(fusion_reference.state_fusion)(
      h[..., n, :], kernels, alpha
    )
    assert_close(y[..., n, :], expected, 1e-13)
  for stride in (1, 2):
    y = conv_xla.grouped(h[..., 0, :], kernels[0], stride=stride)
    expected = smk.depthwise_conv(h[..., 0, :], kernels[0], stride=stride)
    assert_close(y, expected, 1e-13)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_scan_goes_on_where_another_ended(implementation):
  """Values and gradients of 13 tokens, at once and as 1, 7 and 5."""
  rng = np.random.default_rng(0)
  batch, channels, states = 2, 3, 2

  def random(*shape):
    return jnp.asarray(rng.standard_normal(shape))

  tokens = (batch, 13, channels)
  arguments = {
    "u": random(*tokens),
    "delta": random(*tokens),
    "B": random(batch, 13, states),
    "A": -jnp.exp(random(channels, states)),
    "delta_bias": random(channels),
    "h0": random(batch, channels, states),
  }
  g = random(*tokens, states), random(batch, channels, states)

  def at_once(u, delta, B, A, delta_bias, h0):
    h = scan_reference.selective_scan(
      u, delta, A, B, delta_bias=delta_bias, h0=h0
    )
    return h, h[:, -1]

  def in_parts(u, delta, B, A, delta_bias, h0):
    parts = []
    for part in (slice(1), slice(1, 8), slice(8, None)):
      h, h0 = smk.selective_scan(
        u[:, part],
        delta[:, part],
        A,
        B[:, part],
        delta_bias=delta_bias,
        h0=h0,
        return_last=True,
        implementation=implementation,
      )
      parts.append(h)
    return jnp.concatenate(parts, 1), h0

  results = [
    with_gradients(lambda x, f=function: f(**x), arguments, g=g)
    for function in (at_once, in_parts)
  ]
  assert_trees_close(results[1], results[0], 1e-12)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_time_step_of_zero_before_softplus(implementation):
  """Where the pieces of softplus have a kink, its derivative is 1/2."""
  u, B = jnp.ones((1, 2, 1)), jnp.ones((1, 2, 1))

  def total(delta):
    h = smk.selective_scan(
      u, delta, -jnp.ones((1, 1)), B, implementation=implementation
    )
    return h[:, 0].sum()

  assert jax.grad(total)(jnp.zeros((1, 2, 1)))[0, 0, 0] == 0.5


def test_scan_is_its_equations(ssm_arguments):
  arguments = ssm_arguments(2, 4, 5, 3, 2, images=jnp.float64)
  u, delta, B = (arguments[k].reshape(2, 20, -1) for k in ("u", "delta", "B"))
  h = smk.selective_scan(u, delta, arguments["A"], B)
  expected = scan_reference.selective_scan(u, delta, arguments["A"], B)
  assert_close(h, expected, 1e-13)


def test_a_shape_that_does_not_fit_is_named(ssm_arguments):
  arguments = ssm_arguments(2, 4, 5, 3, 2, images=jnp.float64)
  arguments["C"] = arguments["C"][..., :1]
  with pytest.raises(ValueError, match=r"C must have shape \[B, H, W, N\]"):
    smk.structure_aware_ssm(**arguments)
  arguments["C"] = arguments["B"].astype(jnp.int32)
  with pytest.raises(ValueError, match="C must be floating point"):
    smk.structure_aware_ssm(**arguments)
  empty = np.zeros((1, 0, 1))
  with pytest.raises(ValueError, match="u is empty"):
    smk.selective_scan(empty, empty, np.ones((1, 1)), empty)
  one = np.ones((2, 3, 1), np.float32)
  with pytest.raises(ValueError, match=r"h0 must have shape \[B, D, N\] with"):
    smk.selective_scan(one, one, -np.ones((1, 1)), one, h0=np.ones((1, 1, 1)))
  with pytest.raises(ValueError, match="dilations must be 1 or more"):
    smk.state_fusion(
      np.ones((1, 2, 2, 1)), np.ones((1, 3, 3, 1)), np.ones(1), dilations=(0,)
    )
  with pytest.raises(ValueError, match="stride must be 1 or more"):
    smk.depthwise_conv(np.ones((1, 2, 2, 1)), np.ones((3, 3, 1)), stride=0)
  with pytest.raises(ValueError, match=r"^silu_depthwise_conv: bias must have"):
    smk.silu_depthwise_conv(
      np.ones((1, 2, 2, 1)), np.ones((3, 3, 1)), np.ones(2), np.ones((1, 3))
    )


def test_an_implementation_that_cannot_serve_is_refused(ssm_arguments):
  arguments = ssm_arguments(1, 2, 2, 1, 1, images=jnp.float64)
  with pytest.raises(ValueError, match="'cuda' is unknown"):
    smk.structure_aware_ssm(**arguments, implementation="cuda")
  for kernel in ("mosaic_tpu", "mosaic_gpu"):
    with pytest.raises(NotImplementedError, match=f"{kernel} computes float32"):
      smk.structure_aware_ssm(**arguments, implementation=kernel)


def test_sizes_that_are_symbols(ssm_arguments):
  """What is exported for images of any size has no kernel, and serves all."""
  n, channels, batch = 2, 3, "b, h, w"
  known = ssm_arguments(1, 1, 1, channels, n)
  scope = jax.export.SymbolicScope()
  arguments = {
    name: jax.ShapeDtypeStruct(
      jax.export.symbolic_shape(f"{batch}, {x.shape[-1]}", scope=scope)
      if name in ("u", "delta", "B", "C")
      else x.shape,
      x.dtype,
    )
    for name, x in known.items()
  }
  operator = jax.jit(lambda arguments: smk.structure_aware_ssm(**arguments))
  exported = jax.export.export(operator, platforms=("cpu", "cuda", "tpu"))
  program = exported(arguments)
  for target in ("tpu_custom_call", "mosaic_gpu"):
    assert target not in program.mlir_module()
  for size in ((1, 1, 1), (2, 2, 7), (1, 12, 11)):
    arguments_now = ssm_arguments(*size, channels, n)
    expected = jax.jit(ssm_reference.structure_aware_ssm)(**arguments_now)
    assert_close(program.call(arguments_now), expected, 2e-6)
  for kernel in ("mosaic_tpu", "mosaic_gpu"):
    named = partial(smk.structure_aware_ssm, implementation=kernel)
    with pytest.raises(NotImplementedError, match="needs sizes that are known"):
      jax.eval_shape(lambda a, named=named: named(**a), arguments)


# 8,192 tokens are summed in two products, 4,099 in one.
@pytest.mark.parametrize("length", [8192, 4099])
def test_gradients_of_a_long_scan(length, x64):
  rng = np.random.default_rng(0)
  arrays = {
    "u": rng.standard_normal((2, length, 2)),
    "delta": rng.standard_normal((2, length, 2)),
    "A": -np.exp(rng.standard_normal((2, 1))),
    "B": rng.standard_normal((2, length, 1)),
    "delta_bias": rng.standard_normal(2),
  }
  arrays = jax.tree.map(jnp.asarray, arrays)
  g = jnp.asarray(rng.standard_normal((2, length, 2, 1)))

  def gradients(scan):
    return jax.jit(jax.grad(lambda arrays: jnp.sum(g * scan(**arrays))))(arrays)

  actual = gradients(smk.selective_scan)
  for name, expected in gradients(scan_reference.selective_scan).items():
    scale = np.abs(expected).max()
    np.testing.assert_allclose(
      actual[name], expected, rtol=0, atol=1e-12 * scale, err_msg=name
    )


def ssm_of_tokens(length, *, batch=2, channels=3, n=2):
  rng = np.random.default_rng(0)

  def random(*shape):
    return jnp.asarray(rng.standard_normal(shape))

  return {
    "u": random(batch, length, channels),
    "delta": random(batch, length, channels),
    "A": -jnp.exp(random(channels, n)),
    "B": random(batch, length, n),
    "C": random(batch, length, n),
    "D": random(channels),
    "delta_bias": random(channels),
  }


# In one piece, in pieces with a rest, and in pieces without.
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("length", "n"), [(1, 1), (7, 5), (131, 2), (128, 1)])
def test_selective_ssm_is_its_equations(implementation, length, n):
  arrays = ssm_of_tokens(length, n=n)
  operator = partial(smk.selective_ssm, implementation=implementation)
  (y, gradients), (expected, expected_gradients) = [
    with_gradients(lambda arrays, op=op: op(**arrays), arrays)
    for op in (operator, selective_ssm_reference.selective_ssm)
  ]
  assert_close(y, expected, 1e-12)
  assert_trees_close(gradients, expected_gradients, 1e-11)


def test_a_chunk_of_the_selective_ssm_fits_into_a_cache():
  sizes = (8, 3136, 128), (8, 784, 256 * 16), (8, 49, 1024 * 16), (1, 131, 6)
  assert [ssm_xla.chunk_length(*x) for x in sizes] == [64, 16, 7, 64]


def test_selective_ssm_of_other_types_and_shapes():
  """Half precision, symbolic sizes, and what does not fit."""
  arrays = ssm_of_tokens(300)
  expected = jax.jit(selective_ssm_reference.selective_ssm)(**arrays)
  images = ("u", "delta", "B", "C")
  half = {
    name: x.astype(jnp.bfloat16 if name in images else jnp.float32)
    for name, x in arrays.items()
  }
  y = jax.jit(smk.selective_ssm)(**half)
  assert y.dtype == jnp.bfloat16
  assert_close(y.astype(jnp.float64), expected, 2**-6)

  batch, length = jax.export.symbolic_shape("b, l")
  shapes = {
    name: jax.ShapeDtypeStruct(
      (batch, length, x.shape[-1]) if name in images else x.shape, x.dtype
    )
    for name, x in arrays.items()
  }
  operator = jax.jit(lambda arrays: smk.selective_ssm(**arrays))
  exported = jax.export.export(operator, platforms=("cpu", "cuda", "tpu"))
  assert_close(exported(shapes).call(arrays), expected, 1e-12)

  del arrays["delta_bias"]
  zero = jnp.zeros(3)
  assert_close(
    smk.selective_ssm(**arrays), smk.selective_ssm(**arrays, delta_bias=zero), 0
  )
  arrays["C"] = arrays["C"][..., :1]
  with pytest.raises(ValueError, match=r"C must have shape \[B, L, N\]"):
    smk.selective_ssm(**arrays)
  with pytest.raises(ValueError, match="selective_ssm: implementation='x' is"):
    smk.selective_ssm(**arrays, implementation="x")


@pytest.mark.parametrize(("rows", "columns"), [(1, 7), (7, 7), (5, 1)])
def test_depthwise_conv_of_other_sizes(rows, columns):
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.standard_normal((2, 4, 6, 3)))
  kernel = jnp.asarray(rng.standard_normal((rows, columns, 3)))
  grouped = partial(conv_xla.grouped, stride=1)
  y, gradients = with_gradients(smk.depthwise_conv, x, kernel)
  expected, expected_gradients = with_gradients(grouped, x, kernel)
  assert_close(y, expected, 1e-13)
  assert_trees_close(gradients, expected_gradients, 1e-12)
  with pytest.raises(ValueError, match="a kernel has odd sizes, not 2 x"):
    smk.depthwise_conv(x, kernel[:1].repeat(2, 0))


def test_causal_depthwise_conv_is_its_equation():
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.standard_normal((2, 9, 3)))
  kernel = jnp.asarray(rng.standard_normal((4, 3)))

  def equation(x, kernel):
    padded = jnp.pad(x, ((0, 0), (3, 0), (0, 0)))
    windows = [padded[:, k : k + 9] for k in range(4)]
    return sum(
      window * taps[None, None]
      for window, taps in zip(windows, kernel, strict=True)
    )

  y, gradients = with_gradients(smk.causal_depthwise_conv, x, kernel)
  expected, expected_gradients = with_gradients(equation, x, kernel)
  assert_close(y, expected, 1e-13)
  assert_trees_close(gradients, expected_gradients, 1e-12)
