"""The operators as the device benchmark checks and times them."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import spatial_mamba_kernels as smk
from spatial_mamba_kernels.activations import relu
from spatial_mamba_kernels.depthwise_conv import xla as conv
from spatial_mamba_kernels.drop_path import all_kept
from spatial_mamba_kernels.layer_norm import xla as norm
from spatial_mamba_kernels.mlp import xla as perceptron

from benchmarks import timing


def _residual_depthwise_conv(x, kernel, *, implementation):
  """XLA's convolution is what it is held against, and its rival.

  The bias is a constant, as the MLP's are; any type has eighths.
  """
  bias = _eighths(x)
  if implementation is None:
    return smk.residual_depthwise_conv(x, kernel, bias)
  return conv.residual(x, kernel, bias, convolve=_grouped)


def _silu_depthwise_conv(x, kernel, projection, *, implementation):
  """XLA's convolution is what it is held against, and its rival.

  The projection follows after the channels.
  """
  arrays = x, kernel, _eighths(x), projection
  if implementation is None:
    results = smk.silu_depthwise_conv(*arrays)
  else:
    results = conv.projected(*arrays, convolve=_grouped)
  return jnp.concatenate(results, axis=-1)


def _relu_depthwise_conv(x, kernel, *, implementation):
  """XLA's convolution is what it is held against, and its rival."""
  bias = _eighths(x)
  if implementation is None:
    return smk.relu_depthwise_conv(x, bias, kernel, stride=2)
  return conv.grouped(relu(x + bias.astype(x.dtype)), kernel, stride=2)


def _eighths(x):
  return jnp.arange(x.shape[-1]) % 17 / 8 - 1


_grouped = partial(conv.grouped, stride=1)


def _mlp(x, w1, w2, residual, *, implementation):
  """XLA's is what it is held against, and its rival.

  Biases are constants: on a CPU XLA sums their cotangents in half precision.
  """
  b1, b2 = (jnp.linspace(-1, 1, w.shape[1]) for w in (w1, w2))
  if implementation is None:
    return smk.mlp(x, w1, b1, w2, b2, residual=residual)
  return perceptron.mlp(x, w1, b1, w2, b2, residual, all_kept(x))


def _residual_layer_norm(x, scale, bias, *, implementation):
  """XLA's is what it is held against, and its rival."""
  if implementation is None:
    return jnp.stack(smk.residual_layer_norm(x, scale, bias))
  return jnp.stack((x, norm.layer_norm(x, scale, bias)))


def _gated_layer_norm(x, scale, bias, gate, *, implementation):
  """XLA's is what it is held against, and its rival."""
  if implementation is None:
    return smk.gated_layer_norm(x, scale, bias, gate)
  return norm.gated(x, scale, bias, gate, all_kept(x))


OPERATORS: dict[str, Callable[..., Any]] = {
  "selective_scan": smk.selective_scan,
  "state_fusion": smk.state_fusion,
  "structure_aware_ssm": smk.structure_aware_ssm,
  "residual_depthwise_conv": _residual_depthwise_conv,
  "silu_depthwise_conv": _silu_depthwise_conv,
  "relu_depthwise_conv": _relu_depthwise_conv,
  "mlp": _mlp,
  "residual_layer_norm": _residual_layer_norm,
  "gated_layer_norm": _gated_layer_norm,
}
# None is "kernel": what the platform has, XLA's where it has none.
IMPLEMENTATIONS = {
  "kernel": None,
  "associative": "associative",
  "sequential": "sequential",
}
# Without a kernel there are two ways to scan, and one to do anything else.
SCANS = ("selective_scan", "structure_aware_ssm")
DIRECTIONS = ("forward", "backward")
DTYPES = ("float32", "bfloat16")
# How often XLA's form rounds a number to bfloat16 on its way: six times in
# SiLU's derivative, and before and after that what it is of.
ROUNDINGS = {"gated_layer_norm": 8, "silu_depthwise_conv": 11}
USUAL_ROUNDINGS = 4


@dataclasses.dataclass(frozen=True)
class Case:
  """An operator at a stage of a network.

  Attributes:
    op: one of `OPERATORS`.
    shape: B, H, W, D, of the mixer; a channel has one state.
    dtype: of what has a number or more a pixel.
  """

  op: str
  shape: tuple[int, int, int, int]
  dtype: str

  def arrays(self) -> dict[str, jax.Array]:
    """Arguments of the operator, random."""
    keys = map(jax.random.key, itertools.count())

    def normal(*shape, dtype="float32"):
      return jax.random.normal(next(keys), shape, dtype)

    *image, channels = self.shape
    stencil = {"kernels": normal(3, 3, 3, channels), "alpha": normal(3)}
    pixels = partial(normal, *image, dtype=self.dtype)
    if self.op.endswith("depthwise_conv"):
      whole = {"x": pixels(channels), "kernel": normal(3, 3, channels)}
      if self.op != "silu_depthwise_conv":
        return whole
      # Numbers that the type of x has, to which they will be cast.
      projection = normal(channels, -(-channels // 32) + 2, dtype=self.dtype)
      return whole | {"projection": projection.astype("float32")}
    if self.op == "mlp":
      narrow, hidden = channels // 2, 2 * channels
      weights = {
        "w1": normal(narrow, hidden) * narrow**-0.5,
        "w2": normal(hidden, narrow) * hidden**-0.5,
      }
      # Numbers that the type of x has, to which they will be cast.
      rounded = jax.tree.map(lambda x: x.astype(self.dtype), weights)
      return {
        "x": pixels(narrow),
        "residual": pixels(narrow),
        **jax.tree.map(lambda x: x.astype("float32"), rounded),
      }
    if "layer_norm" in self.op:
      whole = {
        "x": pixels(channels),
        "scale": normal(channels),
        "bias": normal(channels),
      }
      is_gated = self.op == "gated_layer_norm"
      return whole | ({"gate": pixels(channels)} if is_gated else {})
    if self.op == "state_fusion":
      return {"h": pixels(channels), **stencil}
    whole = {
      "u": pixels(channels),
      "delta": pixels(channels),
      "A": -jnp.exp(normal(channels, 1)),
      "B": pixels(1),
      "delta_bias": normal(channels),
    }
    if self.op == "structure_aware_ssm":
      return {**whole, "C": pixels(1), "D": normal(channels), **stencil}
    return {
      name: x.reshape(len(x), -1, x.shape[-1]) if x.ndim == 4 else x
      for name, x in whole.items()
    }

  @property
  def implementations(self) -> tuple[str, ...]:
    """Those of `IMPLEMENTATIONS` that differ, the reference last."""
    return tuple(IMPLEMENTATIONS)[: 3 if self.op in SCANS else 2]

  @property
  def reference(self) -> "tuple[Case, str]":
    """What values and gradients are held against: the case, and how run."""
    exact = dataclasses.replace(self, dtype="float32")
    return exact, self.implementations[-1]

  @property
  def tolerance(self) -> float:
    """Of errors, relative to the greatest number.

    In bfloat16 each rounding is by 2**-9 at most. In float32 those of a sum
    over n pixels, one after the other, wander by some sqrt(n) of 2**-24.
    """
    if self.dtype == "bfloat16":
      return 2**-9 * ROUNDINGS.get(self.op, USUAL_ROUNDINGS)
    return 2**-24 * max(128, math.prod(self.shape[:3]) ** 0.5)

  def run(self, implementation: str) -> Callable[..., Any]:
    """The operator, of a dictionary of arrays."""
    operator = partial(
      OPERATORS[self.op], implementation=IMPLEMENTATIONS[implementation]
    )
    return lambda arrays: operator(**arrays)


class Programs(NamedTuple):
  """A case's compiled programs.

  Attributes:
    forward: arrays -> result.
    save: arrays -> (result, what pulls cotangents back).
    backward: (what pulls back, cotangent) -> cotangents of the arrays.
  """

  forward: Callable[..., Any]
  save: Callable[..., Any]
  backward: Callable[..., Any]


def stage_cases(stage: tuple[int, int], batch_size: int) -> list[Case]:
  """Each operator and precision at a stage: (H = W, D)."""
  size, channels = stage
  return [
    Case(op, (batch_size, size, size, channels), dtype)
    for dtype, op in itertools.product(DTYPES, OPERATORS)
    # In float32 the MLP is XLA's.
    if (op, dtype) != ("mlp", "float32")
  ]


def compile_case(case: Case, implementation: str) -> Programs:
  """Compiles one of the `IMPLEMENTATIONS`."""
  return Programs(*(x.compile() for x in _lower(case, implementation)))


def _lower(case, implementation):
  run = case.run(implementation)
  save = jax.jit(lambda arrays: jax.vjp(run, arrays))
  backward = jax.jit(lambda pullback, g: pullback(g)[0])
  # By default a GPU rounds what it multiplies, of float32 numbers, to 11 bits.
  with jax.default_matmul_precision("highest"):
    arrays = jax.eval_shape(case.arrays)
    result, pullback = jax.eval_shape(save, arrays)
    return (
      jax.jit(run).lower(arrays),
      save.lower(arrays),
      backward.lower(pullback, result),
    )


def measure(
  case: Case,
  compiled: Callable[[Case, str], Programs],
  copy_rate: float,
) -> Iterator[dict[str, Any]]:
  """Checks and times a case; a record for each implementation.

  Its `errors` are those of the result and of each gradient from the reference's
  in float32 on the same numbers, relative to the greatest one; `ok` says
  whether that is what rounding makes. Of each direction there are `seconds` and
  `spread` (see `timing.Timing`), `bytes_per_second` over the compulsory bytes
  (arguments and result; backward also the cotangents of both) and `copy_share`,
  of the rate at which the device copies.

  Args:
    case: what to measure.
    compiled: what `compile_case` gave, also for the case's `reference`.
    copy_rate: of the device, in bytes/s.
  """
  arrays = case.arrays()
  exact = jax.tree.map(lambda x: x.astype(jnp.float32), arrays)
  wanted, g = None, None
  for name in case.implementations:
    programs = compiled(case, name)
    result, pullback = programs.save(arrays)
    if g is None or wanted is None:
      g = jax.random.normal(jax.random.key(0), result.shape, result.dtype)
      reference = compiled(*case.reference)
      wanted = _values(reference, exact, g.astype(jnp.float32))
    errors = jax.tree.map(_error, _values(programs, arrays, g), wanted)
    errors = jax.tree.map(float, errors)
    forward_bytes = _bytes((arrays, result))
    calls = {
      "forward": (partial(programs.forward, arrays), forward_bytes),
      "backward": (
        partial(programs.backward, pullback, g),
        forward_bytes + _bytes(arrays),
      ),
    }
    yield {
      **dataclasses.asdict(case),
      "implementation": name,
      "errors": errors,
      # An error that is no number is none of these.
      "ok": all(x <= case.tolerance for x in errors.values()),
      **{
        direction: _record(timing.time_calls(call), size, copy_rate)
        for direction, (call, size) in calls.items()
      },
    }


def _values(programs, arrays, g):
  result, pullback = programs.save(arrays)
  return {"result": result, **programs.backward(pullback, g)}


def _error(actual, wanted):
  # Cotangents may vanish: of A for one token.
  scale = jnp.maximum(jnp.abs(wanted).max(), 1e-6)
  return jnp.abs(actual.astype(jnp.float32) - wanted).max() / scale


def _record(measured, size, copy_rate):
  rate = size / measured.seconds
  return {
    **dataclasses.asdict(measured),
    "bytes_per_second": rate,
    "copy_share": rate / copy_rate,
  }


def _bytes(tree):
  return sum(x.nbytes for x in jax.tree.leaves(tree))
