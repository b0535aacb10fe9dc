"""Compiles and measures one scan for `benchmarks.formulations`."""

import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import spatial_mamba_kernels as smk
from jax.sharding import SingleDeviceSharding
from spatial_mamba_kernels.case import Sizes
from spatial_mamba_kernels.selective_scan import reference

from benchmarks import machine, operators, scan_forms, timing
from spatial_mamba_jax.forecast import hlo, topology

# {name: (u, delta, A, B, delta_bias) -> states}.
FORMS: dict[str, Callable[..., Any]] = {
  operators.DEFAULT: smk.selective_scan,
  "sequential": partial(smk.selective_scan, implementation="sequential"),
  "associative": partial(smk.selective_scan, implementation="associative"),
  "chunked": scan_forms.chunked,
}
TORCH_FORMS: dict[str, Callable[..., Any]] = {
  "PyTorch loop": scan_forms.torch_loop,
  "PyTorch prefix": scan_forms.torch_prefix,
}
CHANNELS = 32  # Channels of the image whose number of tokens varies.
# Seconds to run or to compile the scan of this image. A form that takes longer
# is left out for images of more tokens.
LONGEST_SECONDS = 2.0
LONGEST_COMPILATION = 60.0


@dataclasses.dataclass(frozen=True)
class Case:
  """A program to measure.

  Attributes:
    form: one of `FORMS` or `TORCH_FORMS`.
    shape: B, L, D; a channel has one state.
    dtype: of u, delta and B.
    gradients: whether the backward pass follows the forward pass.
  """

  form: str
  shape: tuple[int, int, int]
  dtype: str
  gradients: bool

  def arguments(self) -> tuple[Any, ...]:
    """Returns random arguments of the program."""
    keys = map(jax.random.key, itertools.count())

    def normal(shape):
      return jax.random.normal(next(keys), shape)

    batch, length, channels = self.shape
    arrays = operators.OPERATORS["selective_scan"].draw(
      normal, Sizes(batch, 1, length, channels), self.dtype
    )
    del arrays["h0"]
    # softplus(-4) is 0.02; the time steps of a fresh network are 0.001 to 0.1.
    arrays["delta_bias"] -= 4
    return (arrays, normal((*self.shape, 1))) if self.gradients else (arrays,)


Send = Callable[[tuple[str, Any]], None]


def measure(send: Send, *, cases: Sequence[Case]) -> None:
  """Measures programs on this machine's device.

  Args:
    send: takes pairs: "machine" and its description, first; "row" and a
      measurement; "left_out" and a case; and "end" after each case.
    cases: what to measure, of each form those of few tokens first.
  """
  if cases[0].form in TORCH_FORMS:
    # The GPU is PyTorch's; JAX only computes the exact values.
    jax.config.update("jax_platforms", "cpu")
    send(("machine", {}))
    run = _measure_torch
  else:
    send(("machine", machine.describe()))
    run = _measure_jax
  _send_rows(send, cases, run)


def _send_rows(send, cases, run):
  slow = set()
  for case in cases:
    kind = case.form, case.dtype, case.gradients
    if case.shape[2] == CHANNELS and kind in slow:
      send(("left_out", dataclasses.asdict(case)))
    else:
      row = run(case)
      is_slow = (
        row.get("seconds", 0) > LONGEST_SECONDS
        or row.get("compile_seconds", 0) > LONGEST_COMPILATION
      )
      if case.shape[2] == CHANNELS and is_slow:
        slow.add(kind)
      send(("row", {**dataclasses.asdict(case), **row}))
    send(("end", None))


def describe(send: Send, *, cases: Sequence[Case], target: str) -> None:
  """Compiles programs for a machine that is not there.

  Args:
    send: as for `measure`; and takes "refused" and the reason why nothing here
      compiles for the target.
    cases: what to compile.
    target: see `topology`.
  """
  topology.use_compilers()
  try:
    device = topology.devices_of(target)[0]
  except topology.TopologyError as error:
    send(("refused", f"--target: {error}"))
    return
  send(("machine", {**machine.describe(), "device": target}))
  sharding = SingleDeviceSharding(device)
  with topology.as_default_device(target):
    _send_rows(send, cases, lambda case: _compile(case, sharding)[1])


def _measure_jax(case):
  compiled, row = _compile(case, None)
  arguments = case.arguments()
  error = _error(jax.device_get(compiled(*arguments)), case)
  timed = timing.time_calls(lambda: compiled(*arguments))
  return {**row, **dataclasses.asdict(timed), "error": error}


def _compile(case, sharding):
  """Returns the compiled program and its figures."""
  program = _program(partial(_call, FORMS[case.form]), case)
  arguments = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
    jax.eval_shape(case.arguments),
  )
  results = jax.eval_shape(program, *arguments)
  lowered = jax.jit(program).lower(*arguments)
  start = time.perf_counter()
  compiled = lowered.compile()
  seconds = time.perf_counter() - start
  memory = compiled.memory_analysis()
  launches = hlo.Program(compiled.as_text() or "").launches()
  assert memory is not None
  return compiled, {
    "compile_seconds": seconds,
    "temporary_bytes": memory.temp_size_in_bytes,
    "moved_bytes": hlo.total_bytes(launches),
    "compulsory_bytes": sum(
      x.size * x.dtype.itemsize for x in jax.tree.leaves((arguments, results))
    ),
    "launches": hlo.total_launches(launches),
    "kernels": operators.count_kernels(compiled),
  }


def _call(form, arrays):
  return form(**arrays)


def _program(function, case):
  """A function of `case.arguments()`: states, and gradients if asked."""
  if not case.gradients:
    return function

  def program(arrays, g):
    h, pullback = jax.vjp(function, arrays)
    return h, pullback(g)[0]

  return program


def _measure_torch(case):
  import torch  # pyright: ignore[reportMissingImports]

  device = "cuda" if torch.cuda.is_available() else "cpu"

  def tensor(x):
    values = torch.from_numpy(np.array(x, np.float32)).to(device)
    return values.to(getattr(torch, x.dtype.name))

  arrays, *g = jax.tree.map(tensor, case.arguments())
  for x in arrays.values():
    x.requires_grad_(case.gradients)

  def call():
    h = TORCH_FORMS[case.form](**arrays)
    if not g:
      return h
    gradients = torch.autograd.grad(h, list(arrays.values()), g)
    return h, dict(zip(arrays, gradients, strict=True))

  def wait(result):
    del result
    if device == "cuda":
      torch.cuda.synchronize()

  result = jax.tree.map(lambda x: x.detach().double().cpu().numpy(), call())
  return {
    **dataclasses.asdict(timing.time_calls(call, wait)),
    "error": _error(result, case),
  }


def _error(result, case):
  """Returns the largest error, relative to the greatest value of its array."""
  exact = _exact(case.shape, case.dtype, case.gradients)
  errors = jax.tree.map(
    lambda x, y: (
      float(np.abs(np.asarray(x, np.float64) - y).max())
      / max(float(np.abs(y).max()), np.finfo(np.float32).tiny)
    ),
    result,
    exact,
  )
  # NaN counts as the largest.
  return max(jax.tree.leaves(errors), key=lambda x: (x != x, x))


# Cached, because all forms are compared with the same values.
@functools.lru_cache(maxsize=1)
def _exact(shape, dtype, gradients):
  """Computes the results of the tests' reference in float64 on the CPU."""
  case = Case("sequential", shape, dtype, gradients)
  arguments = jax.device_get(case.arguments())
  with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
    arguments = jax.tree.map(partial(jnp.asarray, dtype="float64"), arguments)
    program = _program(partial(_call, reference.selective_scan), case)
    return jax.device_get(jax.jit(program)(*arguments))
