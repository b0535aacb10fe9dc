"""Measures where time goes on this machine, by kind of layer.

    python -m benchmarks.profile

JAX's profiler times every instruction of inference and of the training step.
The tables give the time of each kind of layer and the bytes that it moves, as
`hlo` counts them. On a GPU or TPU, the times add up to less than the time of a
call, because the device also waits. On a CPU they may add up to more, because
cores run instructions in parallel.

It needs jax, flax and optax.
"""

import argparse
import collections
import dataclasses
import os
import pathlib
import re
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax

import spatial_mamba_jax as smj
from benchmarks import kinds, network
from spatial_mamba_jax.forecast import hlo

CALLS = 3
LONGEST = 20
# {device in a profile: prefix of its lines that hold instructions}.
_LINES = {
  "/device:GPU:0": "Stream",
  "/device:TPU:0": "XLA Ops",
  "/host:CPU": "",
}


@dataclasses.dataclass(frozen=True)
class Row:
  """A row of a table; figures are for one call.

  Attributes:
    name: the kind of layer, or the instruction.
    seconds: time in which its instructions ran.
    launches: number of its instructions.
    size: bytes that they move.
  """

  name: str
  seconds: float
  launches: int
  size: int


def main() -> None:
  """Prints two Markdown tables for each program: by kind, and the longest."""
  arguments = _parse()
  # A command buffer would be a single launch.
  flags = os.environ.get("XLA_FLAGS", "")
  os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_enable_command_buffer="
  config = network.experiment(
    arguments.model,
    batch_size=arguments.batch_size,
    dtype=arguments.dtype,
    implementation="",
  )
  for name in arguments.programs:
    program = network.compile_program(name, config, arguments.size)
    seconds, spans = profile(program.prepare())
    text = program.compiled.as_text()
    assert text is not None
    by_kind, longest = rows(hlo.Program(text), spans)
    title = (
      f"{arguments.model} at {arguments.size}, {name}, {arguments.dtype}, batch"
      f" {arguments.batch_size}, {jax.devices()[0].device_kind}, jax"
      f" {jax.__version__}: {1e3 * seconds:,.2f} ms a call"
    )
    busy = by_kind[0].seconds
    print(*_table(title, by_kind, busy), "", sep="\n")
    print(*_table("longest", longest[:LONGEST], busy), "", sep="\n", flush=True)


def profile(call: Callable[[], Any]) -> tuple[float, dict[str, float]]:
  """Returns seconds of a call, and {instruction: seconds in which it ran}.

  Args:
    call: queues a program and returns its results.
  """
  jax.block_until_ready(call())
  options = jax.profiler.ProfileOptions()
  options.python_tracer_level = 0
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder, profiler_options=options):
      start = time.perf_counter()
      result = None
      for _ in range(CALLS):
        result = call()
      jax.block_until_ready(result)
      seconds = time.perf_counter() - start
    (file,) = pathlib.Path(folder).rglob("*.xplane.pb")
    profiled = jax.profiler.ProfileData.from_file(str(file))
  return seconds / CALLS, sum_spans(profiled)


def sum_spans(profiled: Any) -> dict[str, float]:
  """Returns {instruction: seconds of a call} of the first device, or the CPU.

  Args:
    profiled: a `jax.profiler.ProfileData` of `CALLS` calls.
  """
  planes = {plane.name: plane for plane in profiled.planes}
  device = next(name for name in _LINES if name in planes)
  spans = collections.Counter()
  for line in planes[device].lines:
    if line.name.startswith(_LINES[device]):
      for event in line.events:
        if name := _instruction(event, device):
          spans[name] += event.duration_ns / 1e9 / CALLS
  return dict(spans)


def _instruction(event, device):
  name = dict(event.stats).get("hlo_op")
  if name is None and device != "/host:CPU":
    # A TPU's event is named by the whole instruction, a kernel's by itself.
    name = re.sub(r"^%([\w.\-]+) = .*", r"\1", event.name, flags=re.S)
  return name


def rows(
  program: hlo.Program, spans: dict[str, float]
) -> tuple[list[Row], list[Row]]:
  """Returns rows by kind of layer and by instruction, the longest first.

  Args:
    program: the profiled program.
    spans: {instruction: seconds}. Loops and branches are left out, because
      their instructions count. A name that the program lacks, such as a
      library's kernel, is of the kind "unknown".
  """
  by_kind = collections.defaultdict(list)
  launched = {x.instruction.name: x for x in program.launches()}
  for name, seconds in spans.items():
    if launch := launched.get(name):
      kind = kinds.kind(program, launch.instruction)
      by_kind[kind].append(
        Row(name, seconds, launch.times, launch.times * launch.size)
      )
    elif name not in program:
      by_kind["unknown"].append(Row(name, seconds, 1, 0))
  whole = [_sum(kind, some) for kind, some in by_kind.items()]
  each = [
    dataclasses.replace(row, name=f"{row.name} ({kind})")
    for kind, some in by_kind.items()
    for row in some
  ]
  return [_sum("all", whole), *_longest(whole)], _longest(each)


def _sum(name, some):
  return Row(
    name,
    sum(row.seconds for row in some),
    sum(row.launches for row in some),
    sum(row.size for row in some),
  )


def _longest(some):
  return sorted(some, key=lambda row: -row.seconds)


def _table(title, some, busy):
  yield f"| {title} | ms | share | launches | MB | GB/s |"
  yield "| --- | --- | --- | --- | --- | --- |"
  for row in some:
    yield (
      f"| {row.name} | {1e3 * row.seconds:,.2f} | {row.seconds / busy:.3f}"
      f" | {row.launches} | {row.size / 1e6:,.0f}"
      f" | {row.size / row.seconds / 1e9:,.0f} |"
    )


def _parse():
  parser = argparse.ArgumentParser(prog="python -m benchmarks.profile")
  parser.add_argument(
    "--model", default="spatial_mamba_tiny", choices=smj.list_models()
  )
  parser.add_argument("--batch-size", type=int, default=128)
  parser.add_argument("--size", type=int, default=224, help="pixels a side")
  parser.add_argument(
    "--dtype", default="bfloat16", choices=("float32", "bfloat16")
  )
  parser.add_argument(
    "--programs",
    nargs="+",
    default=network.PROGRAMS,
    choices=network.PROGRAMS,
  )
  return parser.parse_args()


if __name__ == "__main__":
  main()
