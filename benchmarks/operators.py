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
from spatial_mamba_kernels import cases
from spatial_mamba_kernels.case import Sizes

from benchmarks import timing

# In a compiled program's text, of the kernels for GPUs and TPUs.
_KERNEL = re.compile(r'custom_call_target="(mosaic_gpu\w*|tpu_custom_call)"')
OPERATORS: dict[str, cases.Case] = {case.name: case for case in cases.CASES}
DTYPES = ("float32", "bfloat16")
# What is best on the platform: a kernel, or XLA's form where it has none.
DEFAULT = "default"


@dataclasses.dataclass(frozen=True)
class Case:
  """An operator at a stage of a network.

  Attributes:
    op: the name of one of the `OPERATORS`.
    shape: B, H, W, D, of the mixer; a channel has one state.
    dtype: of images.
  """

  op: str
  shape: tuple[int, int, int, int]
  dtype: str

  def arrays(self) -> dict[str, jax.Array]:
    """Random arguments of the operator."""
    keys = map(jax.random.key, itertools.count())
    return OPERATORS[self.op].draw(
      lambda shape: jax.random.normal(next(keys), shape),
      Sizes(*self.shape),
      self.dtype,
    )

  @property
  def implementations(self) -> tuple[str, ...]:
    """The default, its rivals among XLA's forms, and last the reference."""
    return (DEFAULT, *OPERATORS[self.op].rivals)

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
      return 2**-9 * OPERATORS[self.op].roundings
    return 2**-24 * max(128, math.prod(self.shape[:3]) ** 0.5)

  def run(self, implementation: str) -> Callable[..., Any]:
    """The operator, of a dictionary of arrays."""
    case = OPERATORS[self.op]
    forms = {DEFAULT: case.function, **case.rivals}
    return lambda arrays: forms[implementation](**arrays)


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
    # Elsewhere a kernel of bfloat16 is XLA's.
    if OPERATORS[op].is_for_every_gpu or dtype == "bfloat16"
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
