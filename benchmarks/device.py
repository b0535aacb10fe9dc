"""Measures this project on the machine at hand: `python -m benchmarks.device`.

It checks every kernel's values and gradients against the reference, measures
how fast the device copies and multiplies, times the operators at the stages of
the tiny model, inference and the training step of tiny, small and base, and
PyTorch's networks of the same size where they are installed. `timing` has the
protocol. After `--minutes` nothing more is begun, and what is left out listed.
What fails, for want of memory say, is listed with its error; the rest goes on.

It writes one JSON file, by default into `benchmarks/results`, of which `python
-m benchmarks.table` makes the README's tables. Needed are jax, flax and optax.
On a CPU it measures less: the tiny network and the operators of one stage, in
float32 (`--scale`).
"""

import argparse
import concurrent.futures
import dataclasses
import datetime
import functools
import itertools
import json
import os
import pathlib
import platform
import sys
import time
import traceback
from collections.abc import Callable, Collection, Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import network, operators, peers, timing
from spatial_mamba_jax.training import provenance

# What speed may depend on.
PACKAGES = (
  *("jax", "jaxlib", "flax", "optax"),
  *("jax-cuda12-plugin", "jax-cuda13-plugin", "libtpu"),
)
# The order in which they are measured, the longest last.
SECTIONS = ("networks", "peers", "operators")
ENVIRONMENT = ("GLIBC_TUNABLES", "JAX_OPTIMIZATION_LEVEL", "XLA_FLAGS")
# At once: what each tries out on a GPU would wait for the others.
COMPILING = 4
RESULTS = pathlib.Path(__file__).parent / "results"


@dataclasses.dataclass(frozen=True)
class Scale:
  """How large what is measured is.

  Attributes:
    stages: (H = W, D) of the operators.
    batch_sizes: of the operators.
    networks: (model, size of the images, implementation; none for the best), at
      the first of the batch sizes.
    dtype: of the networks, of their peers and of the product.
    peers: names of PyTorch's networks.
    matmul: rows and columns of the product whose rate is measured.
    copy: bytes copied.
  """

  stages: tuple[tuple[int, int], ...]
  batch_sizes: tuple[int, ...]
  networks: tuple[tuple[str, int, str], ...]
  dtype: str
  peers: tuple[str, ...]
  matmul: int
  copy: int


ACCELERATOR = Scale(
  stages=((56, 128), (28, 256), (14, 512), (7, 1024)),
  batch_sizes=(128, 1),
  networks=tuple(
    (f"spatial_mamba_{model}", size, implementation)
    for model, size in (
      ("tiny", 224),
      ("small", 224),
      ("base", 224),
      ("tiny", 512),
    )
    for implementation in ("", "associative")
  ),
  dtype="bfloat16",
  peers=peers.MODELS,
  matmul=8192,
  copy=2**30,
)
CPU = Scale(
  stages=((28, 256),),
  batch_sizes=(8,),
  networks=(("spatial_mamba_tiny", 224, ""),),
  dtype="float32",
  peers=peers.MODELS,
  matmul=2048,
  copy=2**28,
)
TEST = Scale(
  stages=((5, 8),),
  batch_sizes=(2,),
  networks=(("spatial_mamba_micro", 32, ""),),
  dtype="bfloat16",
  peers=(),
  matmul=256,
  copy=2**20,
)
SCALES = {"accelerator": ACCELERATOR, "cpu": CPU, "test": TEST}


def main() -> None:
  """Measures, and writes what was measured; status 1 where something failed."""
  arguments = _parse()
  is_cpu = jax.default_backend() == "cpu"
  scale = SCALES[arguments.scale or ("cpu" if is_cpu else "accelerator")]
  deadline = time.monotonic() + 60 * arguments.minutes
  record = describe_machine()
  output = arguments.output or RESULTS / _file_name(record)
  try:
    output.parent.mkdir(parents=True, exist_ok=True)
    output.touch()
  except OSError as error:
    sys.exit(f"--output: {error}")
  rates = {
    "copy_bytes_per_second": timing.copy_rate(scale.copy),
    "matmul_flops": timing.matmul_rate(jnp.dtype(scale.dtype), scale.matmul),
  }
  record |= rates | {"dtype": scale.dtype}
  print(json.dumps(record), flush=True)
  sections = {
    "networks": _networks(scale, rates["matmul_flops"]),
    "peers": _peers(scale),
    "operators": _operators(scale, rates["copy_bytes_per_second"]),
  }
  record |= {name: [] for name in sections} | {"left_out": [], "failed": {}}
  if "peers" in arguments.sections and scale.peers and not sections["peers"]:
    record["left_out"].append("peers: torch and timm are not installed")
  for name in arguments.sections:
    for label, task in sections[name]:
      # A crash leaves no more than what is in the file.
      output.write_text(json.dumps({**record, "begun": label}, indent=1) + "\n")
      if time.monotonic() > deadline:
        record["left_out"].append(label)
      elif failure := _run(task, record[name]):
        record["failed"][label] = failure
  output.write_text(json.dumps(record, indent=1) + "\n")
  print(f"written to {output}", file=sys.stderr)
  complaints = list(_complaints(record))
  if complaints:
    sys.exit("\n".join(complaints))


def _run(task, rows):
  """Appends the rows of a task; returns why there are no more, if it failed."""
  try:
    for row in task():
      print(json.dumps(row), flush=True)
      rows.append(row)
  # Whatever it was: a machine's time is too dear to lose the rest.
  except Exception as error:
    traceback.print_exc()
    return f"{type(error).__name__}: {error}"
  return None


def _complaints(record):
  wrong = [row for row in record["operators"] if not row["ok"]]
  if wrong:
    yield f"{len(wrong)} operators are wrong, the first: {wrong[0]}"
  if record["failed"]:
    yield f"failed: {', '.join(record['failed'])}"


def describe_machine() -> dict[str, Any]:
  """Where and with what all that follows was measured."""
  device = jax.devices()[0]
  return {
    "device": device.device_kind,
    "devices": jax.device_count(),
    "platform": device.platform,
    "host": platform.machine(),
    "cores": os.cpu_count(),
    "python": platform.python_version(),
    "versions": provenance.versions(PACKAGES),
    "environment": {x: os.environ[x] for x in ENVIRONMENT if x in os.environ},
    "commit": provenance.commit() or "unknown",
    "date": datetime.date.today().isoformat(),
    "command": "python -m benchmarks.device " + " ".join(sys.argv[1:]),
    "protocol": timing.__doc__,
  }


Task = tuple[str, Callable[[], Iterable[dict[str, Any]]]]


def _operators(scale: Scale, copy_rate: float) -> list[Task]:
  tasks = []
  for batch_size, stage in itertools.product(scale.batch_sizes, scale.stages):
    cases = operators.stage_cases(stage, batch_size)
    whats = {
      *((case, name) for case in cases for name in case.implementations),
      *(case.reference for case in cases),
    }
    compiled = _Compiled(operators.compile_case, whats)
    tasks += [
      (str(case), partial(operators.measure, case, compiled, copy_rate))
      for case in cases
    ]
  return tasks


def _networks(scale: Scale, rate: float) -> list[Task]:
  batch_size = scale.batch_sizes[0]

  def task(compiled, model, size, implementation, program):
    built = compiled(model, size, implementation, program)
    measured = network.measure(built, rate)
    yield {
      "model": model,
      "size": size,
      "batch_size": batch_size,
      "program": program,
      "implementation": implementation or "default",
      "kernels": operators.count_kernels(built.compiled),
      **dataclasses.asdict(measured),
    }

  tasks = []
  for _, same_size in itertools.groupby(scale.networks, lambda x: x[:2]):
    whats = [
      (*which, program)
      for which, program in itertools.product(same_size, network.PROGRAMS)
    ]
    compiled = _Compiled(partial(_compile_network, scale), whats)
    tasks += [
      (" ".join(map(str, what)), partial(task, compiled, *what))
      for what in whats
    ]
  return tasks


def _compile_network(scale, model, size, implementation, program):
  config = network.experiment(
    model,
    batch_size=scale.batch_sizes[0],
    dtype=scale.dtype,
    implementation=implementation,
  )
  return network.compile_program(program, config, size)


class _Compiled:
  """Programs, all compiled in threads when one is asked for.

  While something is timed, nothing is compiled.
  """

  def __init__(
    self,
    compile_one: Callable[..., Any],
    whats: Collection[tuple[Any, ...]],
  ):
    self._whats = whats
    self._compile_one = compile_one

  def __call__(self, *what: Any) -> Any:
    return self._futures[what].result()

  @functools.cached_property
  def _futures(self):
    with concurrent.futures.ThreadPoolExecutor(COMPILING) as pool:
      return {x: pool.submit(self._compile_one, *x) for x in self._whats}


def _peers(scale: Scale) -> list[Task]:
  device = {"gpu": "cuda", "cpu": "cpu"}.get(jax.default_backend())
  if device is None or not all(map(provenance.is_installed, ("torch", "timm"))):
    return []

  def task(name):
    return partial(
      peers.measure, scale.batch_sizes[0], device, scale.dtype, (name,)
    )

  return [(name, task(name)) for name in scale.peers]


def _file_name(record):
  kind = record["device"].lower().replace(" ", "-")
  return f"{kind}-jax-{record['versions']['jax']}.json"


def _parse():
  parser = argparse.ArgumentParser(prog="python -m benchmarks.device")
  parser.add_argument("--output", type=pathlib.Path, help="a JSON file")
  parser.add_argument(
    "--scale",
    choices=SCALES,
    help="how large what is measured is; default: by what is there",
  )
  parser.add_argument("--minutes", type=float, default=6.5)
  parser.add_argument(
    "--sections", nargs="+", default=SECTIONS, choices=SECTIONS
  )
  return parser.parse_args()


if __name__ == "__main__":
  main()
