"""The operators as the device benchmark checks and times them."""

import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import spatial_mamba_kernels as smk
from spatial_mamba_kernels.depthwise_conv import xla as conv
from spatial_mamba_kernels.layer_norm import xla as norm
from spatial_mamba_kernels.mlp import xla as perceptron

from benchmarks import timing


def _depthwise_conv(x, kernel, *, implementation):
  """XLA's convolution is what it is held against, and its rival."""
  if implementation is None:
    return smk.depthwise_conv(x, kernel)
  return _grouped(x, kernel)


def _residual_depthwise_conv(x, kernel, bias, *, implementation):
  """XLA's convolution is what it is held against, and its rival."""
  if implementation is None:
    return smk.residual_depthwise_conv(x, kernel, bias)
  return conv.residual(x, kernel, bias, convolve=_grouped)


def _silu_depthwise_conv(x, kernel, bias, projection, *, implementation):
  """XLA's convolution is what it is held against, and its rival."""
  if implementation is None:
    return smk.silu_depthwise_conv(x, kernel, bias, projection)
  return conv.projected(x, kernel, bias, projection, convolve=_grouped)


_grouped = partial(conv.grouped, stride=1)


def _mlp(x, w1, b1, w2, b2, residual, *, implementation):
  """XLA's is what it is held against, and its rival."""
  if implementation is None:
    return smk.mlp(x, w1, b1, w2, b2, residual=residual, branch_scale=_drop(x))
  return perceptron.mlp(x, w1, b1, w2, b2, residual, _drop(x))


def _drop(x):
  """Scales of images, of which each fourth is dropped."""
  return (jnp.arange(len(x)) % 4 != 3) / 0.75


def _residual_layer_norm(x, scale, bias, *, implementation):
  """XLA's is what it is held against, and its rival."""
  if implementation is None:
    return smk.residual_layer_norm(x, scale, bias)
  return x, norm.layer_norm(x, scale, bias)


def _gated_layer_norm(x, scale, bias, gate, *, implementation):
  """XLA's is what it is held against, and its rival."""
  if implementation is None:
    return smk.gated_layer_norm(x, scale, bias, gate, _drop(x))
  return norm.gated(x, scale, bias, gate, _drop(x))


OPERATORS: dict[str, Callable[..., Any]] = {
  "selective_scan": smk.selective_scan,
  "state_fusion": smk.state_fusion,
  "structure_aware_ssm": smk.structure_aware_ssm,
  "depthwise_conv": _depthwise_conv,
  "residual_depthwise_conv": _residual_depthwise_conv,
  "silu_depthwise_conv": _silu_depthwise_conv,
  "mlp": _mlp,
  "residual_layer_norm": _residual_layer_norm,
  "gated_layer_norm": _gated_layer_norm,
}
# None is what is best on the platform: a kernel, or XLA's where it has none.
# Without a kernel there are two ways to scan, and one to do anything else.
IMPLEMENTATIONS = {"default": None, "XLA": "associative"}
SCAN_IMPLEMENTATIONS = {
  "default": None,
  "associative": "associative",
  "sequential": "sequential",
}
SCANS = ("selective_scan", "structure_aware_ssm")
# In a compiled program's text, of the kernels for GPUs and TPUs.
_KERNEL = re.compile(r'custom_call_target="(mosaic_gpu\w*|tpu_custom_call)"')
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
      if self.op == "depthwise_conv":
        return whole
      whole |= {"bias": normal(channels)}
      if self.op == "residual_depthwise_conv":
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
        "b1": normal(hidden),
        "b2": normal(narrow),
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
    """The default, its rival among XLA's forms, and last the reference."""
    return tuple(self._implementations)

  @property
  def _implementations(self):
    return SCAN_IMPLEMENTATIONS if self.op in SCANS else IMPLEMENTATIONS

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
      OPERATORS[self.op], implementation=self._implementations[implementation]
    )
    return lambda arrays: operator(**arrays)


class Programs(NamedTuple):
  """A case's compiled programs.

  Attributes:
    forward: arrays -> result.
    save: arrays -> (result, what pulls cotangents back).
    backward: (what pulls back, cotangent) -> cotangents of the arrays.
  """

  forward: jax.stages.Compiled
  save: jax.stages.Compiled
  backward: jax.stages.Compiled


def stage_cases(op: str, stage: tuple[int, int], batch_size: int) -> list[Case]:
  """An operator in each precision at a stage: (H = W, D)."""
  size, channels = stage
  return [
    Case(op, (batch_size, size, size, channels), dtype)
    for dtype in DTYPES
    # In float32 the MLP is XLA's.
    if (op, dtype) != ("mlp", "float32")
  ]


def compile_case(case: Case, implementation: str) -> Programs:
  """Compiles one of the case's implementations."""
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
  whether each is what rounding makes, or no more than XLA's. Of each direction
  there are `kernels` (how many of Pallas, where 0 is XLA's form), `seconds` and
  `spread` (see `timing.Timing`), `bytes_per_second` over the compulsory bytes
  (arguments and result; backward also the cotangents of both) and `copy_share`,
  of the rate at which the device copies.

  Args:
    case: what to measure.
    compiled: what `compile_case` gave, also for the case's `reference`.
    copy_rate: of the device, in bytes/s.
  """
  arrays = case.arrays()
  programs = {name: compiled(case, name) for name in case.implementations}
  errors = _errors(case, arrays, programs, compiled(*case.reference))
  rival = errors[case.implementations[1]]
  for name, (forward, save, backward) in programs.items():
    result, pullback = save(arrays)
    calls = {
      "forward": (forward, (arrays,), (arrays, result)),
      "backward": (backward, (pullback, result), (arrays, arrays, result)),
    }
    yield {
      **dataclasses.asdict(case),
      "implementation": name,
      "errors": errors[name],
      # An error that is no number is none of these.
      "ok": all(
        error <= max(case.tolerance, rival[argument])
        for argument, error in errors[name].items()
      ),
      **{
        direction: {
          "kernels": count_kernels(program),
          **_timed(partial(program, *arguments), moved, copy_rate),
        }
        for direction, (program, arguments, moved) in calls.items()
      },
    }


def count_kernels(program: jax.stages.Compiled) -> int:
  """How many of Pallas a compiled program calls."""
  return len(_KERNEL.findall(program.as_text() or ""))


def _errors(case, arrays, programs, reference):
  """{implementation: {"result" or argument: error}}."""
  keys = map(jax.random.key, itertools.count())
  result = jax.eval_shape(case.run(case.implementations[0]), arrays)
  g = jax.tree.map(
    lambda x: jax.random.normal(next(keys), x.shape, x.dtype), result
  )
  exact = jax.tree.map(lambda x: x.astype(jnp.float32), (arrays, g))
  wanted = _values(reference, *exact)

  def errors(name):
    of = jax.tree.map(_error, _values(programs[name], arrays, g), wanted)
    return {
      name: max(map(float, jax.tree.leaves(x)), key=lambda x: (x != x, x))
      for name, x in of.items()
    }

  return {name: errors(name) for name in programs}


def _values(programs, arrays, g):
  result, pullback = programs.save(arrays)
  return {"result": result, **programs.backward(pullback, g)}


def _error(actual, wanted):
  # Cotangents may vanish: of A for one token.
  scale = jnp.maximum(jnp.abs(wanted).max(), 1e-6)
  return jnp.abs(actual.astype(jnp.float32) - wanted).max() / scale


def _timed(call, moved, copy_rate):
  measured = timing.time_calls(call)
  rate = sum(x.nbytes for x in jax.tree.leaves(moved)) / measured.seconds
  return {
    **dataclasses.asdict(measured),
    "bytes_per_second": rate,
    "copy_share": rate / copy_rate,
  }
