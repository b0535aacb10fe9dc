"""Speed and memory of a model: `python -m benchmarks.model`.

Prints the time to compile, images a second of inference and of the training
step, the share of the matrix-multiplication rate measured in the same process,
and the peak memory of the compiled programs.

Protocol: one batch resident on the device, warm-up, then the median of
synchronised calls. The work counted is the model's multiply-adds (2 FLOP each;
three times the forward's for a training step), whatever the implementation.
"""

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import spatial_mamba_jax as smj


@dataclasses.dataclass(frozen=True)
class Measurement:
  """One compiled program.

  Attributes:
    compile_seconds: lowering and compiling.
    images_per_second: the batch over the median call.
    matmul_share: achieved FLOP/s over the matmul rate of this process.
    peak_bytes: arguments, results and temporaries, as the compiler plans them.
  """

  compile_seconds: float
  images_per_second: float
  matmul_share: float
  peak_bytes: int


def main() -> None:
  """Measures as the command line says."""
  arguments = _parse()
  device = jax.devices()[0]
  rate = matmul_rate(jnp.dtype(arguments.dtype))
  results = measure(arguments, rate)
  if arguments.json:
    record = {
      **vars(arguments),
      "device": device.device_kind,
      "jax": jax.__version__,
      "matmul_flops": rate,
      **{name: dataclasses.asdict(m) for name, m in results.items()},
    }
    print(json.dumps(record))
    return
  print(
    f"{arguments.model}, batch {arguments.batch_size} at {arguments.size},"
    f" {arguments.dtype}, implementation {arguments.implementation or 'None'},"
    f" {device.device_kind}, jax {jax.__version__}"
  )
  print(f"matmul rate  {rate / 1e9:10.1f} GFLOP/s")
  for name, m in results.items():
    print(
      f"{name:12s} {m.images_per_second:10.2f} images/s"
      f"  {m.matmul_share:6.3f} of the matmul rate"
      f"  {m.peak_bytes / 2**20:9.1f} MiB"
      f"  compiled in {m.compile_seconds:.1f} s"
    )


def measure(
  arguments: argparse.Namespace, rate: float
) -> dict[str, Measurement]:
  """The programs asked for, by name."""
  size, batch_size = arguments.size, arguments.batch_size
  model = smj.create_model(
    arguments.model,
    rngs=nnx.Rngs(0),
    dtype=arguments.dtype,
    implementation=arguments.implementation,
  )
  images = jax.random.normal(jax.random.key(0), (batch_size, size, size, 3))
  flops = batch_size * forward_flops(model.config, size)
  results = {}
  if "inference" in arguments.programs:
    model.eval()
    graphdef, state = nnx.split(model)
    infer = jax.jit(lambda state, images: nnx.merge(graphdef, state)(images))
    results["inference"] = _time(
      infer, (state, images), batch_size, flops, rate, arguments.repeats
    )
  if "train" in arguments.programs:
    step, state = _train_step(model)
    results["train"] = _time(
      step, (state, images), batch_size, 3 * flops, rate, arguments.repeats
    )
  return results


def matmul_rate(dtype: Any, size: int = 2048) -> float:
  """FLOP/s of a square matrix product in this precision, the best of ten."""
  x = jnp.ones((size, size), dtype)
  product = jax.jit(jnp.matmul)
  jax.block_until_ready(product(x, x))
  seconds = min(_seconds(product, (x, x)) for _ in range(10))
  return 2 * size**3 / seconds


def forward_flops(config: smj.ModelConfig, size: int) -> float:
  """FLOP of one image, twice the multiply-adds (4.42 GMAC for tiny at 224).

  The paper has 4.43 for tiny; it may count the scan's exponentials.
  """
  half = -(-size // 2)
  side = -(-half // 2)
  dim = config.dims[0]
  macs = half**2 * (9 * 3 * (dim // 2) + 2 * 9 * (dim // 2) ** 2)
  macs += side**2 * (9 * (dim // 2) * 4 * dim + 4 * dim * dim)
  for i, (dim, depth) in enumerate(
    zip(config.dims, config.depths, strict=True)
  ):
    inner, rank = config.expand * dim, config.dt_rank(dim)
    block = 3 * dim * inner + inner * (2 * rank + 2 * config.d_state)
    block += 2 * int(config.mlp_ratio * dim) * dim
    # Depthwise convolutions; decay, drive and observation of the states, their
    # fusion by 27 taps; the skip connection.
    block += 2 * 9 * dim + 9 * inner + (3 + 27) * inner * config.d_state + inner
    macs += side**2 * depth * block
    if i + 1 < len(config.dims):
      wide, dim_out = 4 * config.dims[i + 1], config.dims[i + 1]
      macs += side**2 * dim * wide
      side = -(-side // 2)
      macs += side**2 * wide * (9 + dim_out)
  return 2.0 * (macs + config.dims[-1] * config.num_classes)


def _train_step(model: smj.SpatialMamba) -> tuple[Callable, Any]:
  """A step of AdamW against the first class, without data or logging."""
  model.train()
  graphdef, params, stats = nnx.split(model, nnx.Param, nnx.BatchStat)
  optimizer = optax.adamw(1e-3)

  def loss(params, stats, images, key):
    model = nnx.merge(graphdef, params, stats, copy=True)
    logits = model(images, rngs=nnx.Rngs(drop_path=key))
    return -jnp.mean(jax.nn.log_softmax(logits)[:, 0]), nnx.state(
      model, nnx.BatchStat
    )

  def step(state, images):
    params, stats, opt_state = state
    key = jax.random.key(0)
    grads, stats = jax.grad(loss, has_aux=True)(params, stats, images, key)
    updates, opt_state = optimizer.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), stats, opt_state

  return jax.jit(step), (params, stats, optimizer.init(params))


def _time(function, arguments, images, flops, rate, repeats) -> Measurement:
  start = time.perf_counter()
  compiled = function.lower(*arguments).compile()
  compile_seconds = time.perf_counter() - start
  jax.block_until_ready(compiled(*arguments))
  seconds = statistics.median(
    _seconds(compiled, arguments) for _ in range(repeats)
  )
  memory = compiled.memory_analysis()
  return Measurement(
    compile_seconds=compile_seconds,
    images_per_second=images / seconds,
    matmul_share=flops / seconds / rate,
    peak_bytes=memory.argument_size_in_bytes
    + memory.output_size_in_bytes
    + memory.temp_size_in_bytes
    - memory.alias_size_in_bytes,
  )


def _seconds(function: Callable, arguments: tuple) -> float:
  start = time.perf_counter()
  jax.block_until_ready(function(*arguments))
  return time.perf_counter() - start


def _parse() -> argparse.Namespace:
  parser = argparse.ArgumentParser(prog="python -m benchmarks.model")
  parser.add_argument(
    "--model", default="spatial_mamba_tiny", choices=smj.list_models()
  )
  parser.add_argument("--batch-size", type=int, default=8)
  parser.add_argument("--size", type=int, default=224, help="pixels a side")
  parser.add_argument(
    "--dtype", default="float32", choices=("float32", "bfloat16")
  )
  parser.add_argument(
    "--implementation", default=None, help="default: the platform's best"
  )
  parser.add_argument(
    "--programs",
    nargs="+",
    default=["inference", "train"],
    choices=("inference", "train"),
  )
  parser.add_argument("--repeats", type=int, default=5)
  parser.add_argument("--json", action="store_true", help="one line of JSON")
  return parser.parse_args()


if __name__ == "__main__":
  main()
