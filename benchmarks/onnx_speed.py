"""Measures onnxruntime beside JAX: `python -m benchmarks.onnx_speed`.

Prints images a second of both on one core, which the program binds itself to,
and the largest difference of their logits. `timing` has the protocol. The
weights are random. onnxruntime has one thread and its default optimisations;
JAX runs the jitted model with the weights as arguments.
"""

import argparse
import os
import pathlib
import tempfile

import jax
import numpy as np
from flax import nnx

import spatial_mamba_jax as smj
from benchmarks import timing


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
  for name, call in calls.items():
    timed = timing.time_calls(call)
    speed = arguments.batch_size / timed.seconds
    print(f"{name:12s} {speed:8.2f} images/s  spread {timed.spread:.1%}")
  expected, logits = (np.asarray(call()) for call in calls.values())
  difference = abs(logits - expected).max() / abs(expected).max()
  print(f"difference   {difference:8.1e} of the largest logit")
  nodes = len(content.graph.node)
  print(f"file         {size / 2**20:8.1f} MiB, {nodes} nodes")


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
