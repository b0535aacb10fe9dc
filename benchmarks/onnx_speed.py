"""Measures onnxruntime beside JAX: `python -m benchmarks.onnx_speed`.

Prints images a second of both on one core, to which the program binds itself,
and the largest difference of their logits. The weights are random. onnxruntime
has one thread and its default optimisations; JAX runs the jitted model with the
weights as arguments. After warm-up, calls of both alternate. The time of a call
is the median of its processor time, so that other work on the core counts
little.
"""

import argparse
import os
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx

import spatial_mamba_jax as smj

# Calls of each, after one to warm up.
TURNS = 15


def main() -> None:
  """Measures as the command line says."""
  arguments = _parse()
  # Before JAX starts its threads.
  os.sched_setaffinity(0, {arguments.core})
  import onnxruntime

  model = smj.create_model(arguments.model, rngs=nnx.Rngs(0))
  shape = arguments.batch_size, arguments.size, arguments.size, 3
  images = np.random.default_rng(0).normal(size=shape).astype(np.float32)
  with tempfile.TemporaryDirectory() as directory:
    path = pathlib.Path(directory) / "model.onnx"
    content = smj.export_onnx(model, path, image_size=arguments.size)
    size = path.stat().st_size
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options)
  graphdef, weights = nnx.split(model)
  forward = jax.jit(lambda weights, x: nnx.merge(graphdef, weights)(x))
  device_images = jax.device_put(images)
  calls = {
    "JAX": lambda: forward(weights, device_images),
    "onnxruntime": lambda: session.run(None, {"images": images})[0],
  }
  print(
    f"{arguments.model}, batch {arguments.batch_size} at {arguments.size},"
    f" one core, jax {jax.__version__}, onnxruntime {onnxruntime.__version__}"
  )
  for name, seconds in _processor_seconds(calls).items():
    speed = arguments.batch_size / statistics.median(seconds)
    slow, fast = (arguments.batch_size / f(seconds) for f in (max, min))
    print(f"{name:12s} {speed:8.2f} images/s  {slow:.2f} to {fast:.2f}")
  expected, logits = (np.asarray(call()) for call in calls.values())
  difference = abs(logits - expected).max() / abs(expected).max()
  print(f"difference   {difference:8.1e} of the largest logit")
  nodes = len(content.graph.node)
  print(f"file         {size / 2**20:8.1f} MiB, {nodes} nodes")


def _processor_seconds(
  calls: dict[str, Callable[[], Any]],
) -> dict[str, list[float]]:
  """Returns the processor time of each call."""
  seconds: dict[str, list[float]] = {name: [] for name in calls}
  for turn in range(TURNS + 1):
    for name, call in calls.items():
      start = time.process_time()
      jax.block_until_ready(call())
      if turn > 0:
        seconds[name].append(time.process_time() - start)
  return seconds


def _parse() -> argparse.Namespace:
  parser = argparse.ArgumentParser(prog="python -m benchmarks.onnx_speed")
  parser.add_argument(
    "--model", default="spatial_mamba_tiny", choices=smj.list_models()
  )
  parser.add_argument("--batch-size", type=int, default=1)
  parser.add_argument("--size", type=int, default=224, help="pixels a side")
  parser.add_argument("--core", type=int, default=0, help="index of the core")
  return parser.parse_args()


if __name__ == "__main__":
  main()
