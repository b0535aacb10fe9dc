"""How a program is timed, and with what its time is compared.

Arguments are resident on the device, and the same in each call: what fits into
its cache may be there. After warm-up, calls are queued in groups that take some
10 ms, so that a clock's tick does not count; the time of a call is the median
group's. All of it is done twice, and how far the two medians lie apart is
stated with each figure. Python takes some 10 to 20 us to queue an operator's
call, and more for a network's many weights: no program is seen to take less.
Operators multiply float32 in full precision, networks as JAX does by default.
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
  """Of one program.

  Attributes:
    seconds: of a call.
    spread: how far two measurements of it lay apart, relative to it.
  """

  seconds: float
  spread: float


def time_calls(
  call: Callable[[], Any],
  wait: Callable[[Any], Any] = jax.block_until_ready,
) -> Timing:
  """Times a program.

  Args:
    call: queues it, and returns what it will compute.
    wait: until the last of what `call` returned has been computed.
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
  """FLOP/s of a square matrix product in this precision."""
  x = jax.random.normal(jax.random.key(0), (size, size), dtype)
  product = jax.jit(jnp.matmul)
  return 2 * size**3 / time_calls(lambda: product(x, x)).seconds


def copy_rate(size: int) -> float:
  """Bytes/s read and written, of copying an array of `size` bytes."""
  x = jnp.zeros(size // 4, jnp.int32)
  # A sign that changes, because XLA would alias a plain copy.
  copy = jax.jit(jnp.negative)
  return 2 * x.nbytes / time_calls(lambda: copy(x)).seconds
