"""What can be read off a kernel compiled for a TPU."""

import glob
import math
import re
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun


def dump_to(folder: str) -> dict[str, str]:
  """Environment variables that have libtpu leave its programs in a folder."""
  return {
    "LIBTPU_INIT_ARGS": f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
  }


def moved_bytes(function: Any, arguments: Any) -> int:
  """What the one kernel in a function moves between HBM and VMEM.

  A block is moved when a step of the grid wants another one than the step
  before; channels in whole registers.
  """
  (call,) = _kernel_calls(jax.make_jaxpr(function)(*arguments).jaxpr)
  mapping = call.params["grid_mapping"]
  # The first axes repeat what the last one does.
  *repeats, last = mapping.grid
  steps = np.arange(last, dtype=np.int32)
  total = 0
  for block in mapping.block_mappings:
    index_map = jaxpr_as_fun(block.index_map_jaxpr)
    indices = np.stack([index_map(0, 0, step) for step in steps])
    moves = 1 + int(np.sum(np.any(np.diff(indices, axis=0), axis=1)))
    array = block.array_aval
    total += moves * math.prod(repeats) * _block_bytes(block, array.dtype)
  return total


def _block_bytes(block, dtype) -> int:
  sizes = [getattr(size, "block_size", size) for size in block.block_shape]
  sizes = [size for size in sizes if isinstance(size, int)]
  *rows, lanes = sizes
  return math.prod(rows) * -(-lanes // 128) * 128 * dtype.itemsize


def _kernel_calls(jaxpr) -> Iterator[Any]:
  for equation in jaxpr.eqns:
    if equation.primitive.name == "pallas_call":
      yield equation
    else:
      for value in equation.params.values():
        if isinstance(value, ClosedJaxpr):
          yield from _kernel_calls(value.jaxpr)


def bundles(dump: str, op: str) -> dict[str, Any]:
  """What `count_bundles` does, of the kernel whose compilation left `dump`."""
  (path,) = (
    name
    for name in glob.glob(f"{dump}/*{op}*-final_bundles.txt")
    if "schedule-analysis" not in name
  )
  with open(path) as file:
    return count_bundles(file.read())


# A bundle with nothing in it does not say how deep it lies.
_BUNDLE = re.compile(r"\s*0x[0-9a-f]+\s+(\w\w)?\s*:?\s*(>*)\s*\{(\}?)")
_EXIT_TEST = re.compile(
  r"scmp\.ge\.\S+ (?:\(\S+\), )?%\w+, (\d+)\s+/\* loop exit test"
)


def count_bundles(text: str) -> dict[str, Any]:
  """Instructions, each a cycle at best, of a scheduled TPU kernel.

  Args:
    text: the file `*-final_bundles.txt` of libtpu's dump.

  Returns:
    `loops`: [trips, bundles of a trip without those of inner loops], innermost
    first; and `step_bundles`: of a step of the grid, every branch taken.

  Raises:
    ValueError: a loop has no end that can be read.
  """
  loops = []
  grid = {"own": 0, "all": 0}  # The outermost loop, and the last to end.
  stack = [{"trips": 0, "own": 0, "all": 0}]  # Depth is the place in it.

  def close(depth):
    while len(stack) > depth:
      loop = stack.pop()
      if not loop["trips"]:
        raise ValueError("cannot tell how often a loop of this kernel runs")
      if len(stack) == 1:
        grid.update(loop)
        return
      stack[-1]["all"] += loop["trips"] * (loop["own"] + loop["all"])
      loops.append((loop["trips"], loop["own"]))

  lines = text.splitlines()
  for line, deepest in zip(lines, _depths_to_come(lines), strict=True):
    if bundle := _BUNDLE.match(line):
      label, depth, is_empty = bundle[1], len(bundle[2]), bundle[3]
      if label == "LB":
        close(depth)
        stack.append({"trips": 0, "own": 0, "all": 0})
      elif not is_empty:
        close(deepest + 1)
      stack[-1]["own"] += 1
    # That of the loop around may stand among an inner loop's last bundles.
    for test in _EXIT_TEST.finditer(line):
      loops_left = [loop for loop in stack if not loop["trips"]]
      loops_left[-1]["trips"] = int(test[1])
  close(1)
  return {"loops": loops, "step_bundles": grid["own"] + grid["all"]}


def _depths_to_come(lines) -> list[int]:
  """Returns the greatest depth, from each line to the next beginning of a loop.

  What follows a loop may stand in a bundle within, for its last trip.
  """
  depths, deepest = [], 0
  for line in reversed(lines):
    if bundle := _BUNDLE.match(line):
      deepest = max(deepest, len(bundle[2]))
    depths.append(deepest)
    if bundle and bundle[1] == "LB":
      deepest = 0
  return depths[::-1]
