"""Times programs, and measures the rates to compare them with.

Arguments are resident on the device and the same in each call, so they may be
in its cache. After warm-up, calls are queued in groups of some 10 ms, which is
long against the resolution of the clock. The time of a call is the median over
groups. Each measurement is repeated, and every figure states the spread of the
two medians. Python takes 10 to 20 us to queue an operator's call, and more for
the many weights of a network: this is the shortest time that can be measured.
Operators multiply float32 in full precision, networks at JAX's default.
"""

import dataclasses
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

GROUP_SECONDS = 0.01
GROUPS = 5


@dataclasses.dataclass(frozen=True)
class Timing:
  """The time of one program.

  Attributes:
    seconds: time of a call.
    spread: difference of two measurements, relative to `seconds`.
  """

  seconds: float
  spread: float


def time_calls(
  call: Callable[[], Any],
  wait: Callable[[Any], Any] = jax.block_until_ready,
) -> Timing:
  """Times a program.

  Args:
    call: queues the program and returns its results.
    wait: waits until the results of the last `call` are computed.
  """
  wait(call())
  count = max(1, math.ceil(GROUP_SECONDS / _seconds(call, wait, 1)))
  first, second = (
    statistics.median(_seconds(call, wait, count) for _ in range(GROUPS))
    for _ in range(2)
  )
  seconds = (first + second) / 2
  return Timing(seconds, abs(first - second) / seconds)


def _seconds(call, wait, count):
  start = time.perf_counter()
  result = None
  for _ in range(count):
    result = call()
  wait(result)
  return (time.perf_counter() - start) / count


def matmul_rate(dtype: Any, size: int) -> float:
  """Measures FLOP/s of a square matrix product in this precision."""
  x = jax.random.normal(jax.random.key(0), (size, size), dtype)
  product = jax.jit(jnp.matmul)
  return 2 * size**3 / time_calls(lambda: product(x, x)).seconds


def copy_rate(size: int) -> float:
  """Measures bytes/s, read and written, of a copy of `size` bytes."""
  x = jnp.zeros(size // 4, jnp.int32)
  # The copy changes the sign, because XLA would alias a plain copy.
  copy = jax.jit(jnp.negative)
  return 2 * x.nbytes / time_calls(lambda: copy(x)).seconds
