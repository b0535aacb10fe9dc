"""Measures the machine and each section for `benchmarks.device`."""

import concurrent.futures
import dataclasses
import functools
import itertools
import os
import sys
import time
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import machine as this_machine
from benchmarks import network, operators, peers, segmentor, timing
from spatial_mamba_jax.training import provenance

# Programs compiled at once. More would wait for each other's autotuning on a
# GPU.
COMPILING = 4


@dataclasses.dataclass(frozen=True)
class Scale:
  """The sizes to measure.

  Attributes:
    stages: (H = W, D) of the operators.
    batch_sizes: batch sizes of the operators; networks use the first.
    networks: (model, image size, implementation); "" for the platform's best.
    segmentor: the model whose backbone UPerNet has; batch size; height and
      width of the images, and side of the training crops.
    dtype: precision of networks, peers and matrix product.
    peers: names of PyTorch networks.
    matmul: rows and columns of the matrix product.
    copy: bytes to copy.
  """

  stages: tuple[tuple[int, int], ...]
  batch_sizes: tuple[int, ...]
  networks: tuple[tuple[str, int, str], ...]
  segmentor: tuple[str, int, tuple[int, int], int]
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
  segmentor=("spatial_mamba_tiny", 16, (512, 2048), 512),
  dtype="bfloat16",
  peers=peers.MODELS,
  matmul=8192,
  copy=2**30,
)
CPU = Scale(
  stages=((28, 256),),
  batch_sizes=(8,),
  networks=(("spatial_mamba_tiny", 224, ""),),
  segmentor=("spatial_mamba_tiny", 2, (128, 512), 128),
  dtype="float32",
  peers=peers.MODELS,
  matmul=2048,
  copy=2**28,
)
TEST = Scale(
  stages=((5, 8),),
  batch_sizes=(2,),
  networks=(("spatial_mamba_micro", 32, ""),),
  segmentor=("spatial_mamba_micro", 2, (32, 64), 32),
  dtype="bfloat16",
  peers=(),
  matmul=256,
  copy=2**20,
)
SCALES = {"accelerator": ACCELERATOR, "cpu": CPU, "test": TEST}


Send = Callable[[tuple[str, Any]], None]


def work(
  send: Send,
  *,
  section: str,
  scale: str | None,
  machine: dict[str, Any],
  begun: Collection[str],
  together: bool,
  deadline: float,
) -> None:
  """Measures a section.

  Args:
    send: takes pairs: "machine" and its description; "compiled" and the number
      of compiled programs; "begin" and a label; "row" and a measurement;
      "failed" and {label: reason}; "end" and a label; "left_out" and a label.
    section: one of `SECTIONS`.
    scale: one of `SCALES`; None to choose by the device.
    machine: the description that was sent before, or empty.
    begun: labels that were sent before.
    together: whether several programs are compiled at once, before they are
      measured.
    deadline: Unix time after which no measurement is started.

  Raises:
    Exception: the last failure, after which the device computes nothing more.
  """
  if section == "peers":
    # JAX would take most of a GPU's memory from PyTorch.
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
  elif machine and jax.devices()[0].device_kind != machine["device"]:
    raise RuntimeError(f"there is no {machine['device']} any more")
  if not machine:
    machine = _describe_machine(scale)
    send(("machine", machine))

  def compiled(compile_one, whats):
    if together and time.time() <= deadline:
      return _compile_together(compile_one, whats, send)
    return functools.cache(compile_one)

  for label, task in SECTIONS[section](machine, begun, compiled):
    if task is None or time.time() > deadline:
      send(("left_out", label))
      continue
    send(("begin", label))
    try:
      for row in task():
        send(("row", row))
    # Any failure: the other measurements must not be lost.
    except Exception as error:
      send(("failed", {label: f"{type(error).__name__}: {error}"}))
      if section == "peers" or not _computes():
        raise
      traceback.print_exc()
    send(("end", label))


def _computes():
  """Returns whether the device still computes."""
  try:
    jax.block_until_ready(jnp.zeros(8) + 1)
  except jax.errors.JaxRuntimeError:
    return False
  return True


def _describe_machine(scale):
  """Returns the properties of the machine on which speed may depend."""
  device = jax.devices()[0]
  scale = scale or ("cpu" if device.platform == "cpu" else "accelerator")
  sizes = SCALES[scale]
  return {
    **this_machine.describe(),
    "command": "python -m benchmarks.device " + " ".join(sys.argv[1:]),
    "scale": scale,
    "copy_bytes_per_second": timing.copy_rate(sizes.copy),
    "matmul_flops": timing.matmul_rate(jnp.dtype(sizes.dtype), sizes.matmul),
    "dtype": sizes.dtype,
  }


# A label, and the function that measures; None where it cannot be measured.
Task = tuple[str, Callable[[], Iterable[dict[str, Any]]] | None]


def _networks(machine, begun, compiled_of) -> Iterator[Task]:
  scale = SCALES[machine["scale"]]

  def task(compiled, what):
    model, size, implementation, program = what
    built = compiled(*what)
    measured = network.measure(built, machine["matmul_flops"])
    yield {
      "model": model,
      "size": size,
      "batch_size": scale.batch_sizes[0],
      "program": program,
      "implementation": implementation or "default",
      "kernels": operators.count_kernels(built.compiled),
      **dataclasses.asdict(measured),
    }

  for _, same_size in itertools.groupby(scale.networks, lambda x: x[:2]):
    whats = {
      " ".join(map(str, (*which, program))): (*which, program)
      for which, program in itertools.product(same_size, network.PROGRAMS)
    }
    whats = {label: what for label, what in whats.items() if label not in begun}
    compiled = compiled_of(partial(_compile_network, scale), whats.values())
    for label, what in whats.items():
      yield label, partial(task, compiled, what)


def _compile_network(scale, model, size, implementation, program):
  config = network.experiment(
    model,
    batch_size=scale.batch_sizes[0],
    dtype=scale.dtype,
    implementation=implementation,
  )
  return network.compile_program(program, config, size)


def _segmentors(machine, begun, compiled_of) -> Iterator[Task]:
  scale = SCALES[machine["scale"]]
  model, batch_size, images, crop = scale.segmentor

  def shape(program):
    return (crop, crop) if program == "train" else images

  def compile_one(program):
    config = segmentor.experiment(
      model, batch_size=batch_size, dtype=scale.dtype
    )
    return segmentor.compile_program(program, config, shape(program))

  def task(compiled, program):
    measured = network.measure(compiled(program), machine["matmul_flops"])
    yield {
      "model": model,
      "shape": shape(program),
      "batch_size": batch_size,
      "program": program,
      **dataclasses.asdict(measured),
    }

  labels = {f"segmentor {name}": name for name in segmentor.PROGRAMS}
  labels = {label: x for label, x in labels.items() if label not in begun}
  compiled = compiled_of(compile_one, [(name,) for name in labels.values()])
  for label, program in labels.items():
    yield label, partial(task, compiled, program)


def _compile_together(
  compile_one: Callable[..., Any],
  whats: Collection[tuple[Any, ...]],
  send: Send,
) -> Callable[..., Any]:
  """Compiles all programs, and returns a function that looks one up.

  Nothing is compiled while a program is timed.
  """
  with concurrent.futures.ThreadPoolExecutor(COMPILING) as pool:
    futures = {x: pool.submit(compile_one, *x) for x in whats}
    done = concurrent.futures.as_completed(futures.values())
    for count, _ in enumerate(done, start=1):
      send(("compiled", count))
  return lambda *what: futures[what].result()


def _peers(machine, begun, compiled_of) -> Iterator[Task]:
  del compiled_of
  scale = SCALES[machine["scale"]]
  device = {"gpu": "cuda", "cpu": "cpu"}.get(machine["platform"])
  if not all(map(provenance.is_installed, ("torch", "timm"))):
    device = None
  for name in scale.peers:
    if device is None:
      yield f"{name} (torch and timm, for a CPU or GPU)", None
    elif name not in begun:
      yield (
        name,
        partial(
          peers.measure, scale.batch_sizes[0], device, scale.dtype, (name,)
        ),
      )


def _operators(machine, begun, compiled_of) -> Iterator[Task]:
  scale = SCALES[machine["scale"]]
  for batch_size, stage, op in itertools.product(
    scale.batch_sizes, scale.stages, operators.OPERATORS
  ):
    cases = operators.stage_cases(op, stage, batch_size)
    cases = [case for case in cases if str(case) not in begun]
    whats = {
      *((case, name) for case in cases for name in case.implementations),
      *(case.reference for case in cases),
    }
    compiled = compiled_of(operators.compile_case, whats)
    for case in cases:
      yield (
        str(case),
        partial(
          operators.measure, case, compiled, machine["copy_bytes_per_second"]
        ),
      )


# {section: its measurements}, in order, the longest last.
SECTIONS = {
  "networks": _networks,
  "segmentors": _segmentors,
  "peers": _peers,
  "operators": _operators,
}
