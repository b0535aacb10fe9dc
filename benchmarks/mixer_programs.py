"""Measures one token mixer for `benchmarks.mixers`.

How much a mixer transposes, gathers or reverses is counted in the jaxpr of its
forward pass, in images of the inner channels: the elements of all results of
such operations, over those of the image that the scans read. What operators do
within themselves is not counted.
"""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.extend.core import jaxprs_in_params
from jax.sharding import SingleDeviceSharding

from benchmarks import network, timing
from spatial_mamba_jax.forecast import hlo, topology
from spatial_mamba_jax.models.mixers import MIXERS, MixerConfig
from spatial_mamba_jax.models.mixers.base import Place
from spatial_mamba_jax.models.pure import PureModel
from spatial_mamba_jax.training.config import TrainConfig

# Pixels a side; a CPU would need hours for the largest.
SIZES = (32, 64, 128, 256, 512)
LARGEST = 2048
# Machines that programs are compiled for, the network, and the pixels of its
# batch: so many that the workspaces of cuBLAS, which count too, do not matter.
TARGETS = ("H200", "v5e:2x2")
COMPILED_MODEL = "spatial_mamba_tiny"
COMPILED_PIXELS = 128 * 224**2
# {primitive: kind} of what is counted.
KINDS = {"transpose": "transposed", "gather": "gathered", "rev": "reversed"}
# Images and channels for which a mixer's moves are counted, and the blocks over
# which they are averaged: after four, `evss` turns images as before. No weight
# has so many rows as there are images.
_COUNTED = (7, 16, 16, 64)
_PLACES = tuple(Place(0, block, block) for block in range(4))

Send = Callable[[dict[str, Any]], None]


def variants() -> dict[str, MixerConfig]:
  """Returns {name: mixer}: all mixers, and two with other settings."""
  gated = dataclasses.replace(
    MIXERS["ss2d"], d_state=16, expand=2, gate=True, conv_bias=True
  )
  aligned = dataclasses.replace(MIXERS["v2m"], aligned=True)
  return {**MIXERS, "ss2d_gated": gated, "v2m_aligned": aligned}


def cost(send: Send, *, mixer: str, model: str, **_: Any) -> None:
  """Sends parameters, FLOP and moves."""
  config = _experiment(mixer, model, 1)
  architecture = config.model.build()
  shapes = PureModel(
    lambda rngs: architecture.family.classifier(architecture, rngs=rngs)
  ).shapes
  send(
    {
      "parameters": sum(x.size for x in jax.tree.leaves(shapes.params)),
      "flops_of_224": network.image_flops(config, 224),
      "moves": moves(variants()[mixer]),
    }
  )


def moves(mixer: MixerConfig) -> dict[str, float]:
  """Returns {kind: images that the forward pass of a mixer moves so}."""
  batch, height, width, dim = _COUNTED
  config = dataclasses.replace(
    _experiment("spatial_mamba", "spatial_mamba_micro", 1).model.build(),
    mixer=mixer,
  )
  image = jax.ShapeDtypeStruct(_COUNTED, jnp.float32)
  counts = dict.fromkeys(KINDS.values(), 0)

  def forward(variant, x):
    return mixer.create(dim, variant, config=config, rngs=nnx.Rngs(0))(x)

  for place in _PLACES:
    jaxpr = jax.make_jaxpr(partial(forward, mixer.variant(place)))(image)
    _add_moved(jaxpr.jaxpr, counts)
  inner = getattr(mixer, "expand", 1) * dim
  whole = batch * height * width * inner * len(_PLACES)
  return {kind: count / whole for kind, count in counts.items()}


def _add_moved(jaxpr, counts):
  for equation in jaxpr.eqns:
    name = equation.primitive.name
    if name in KINDS and equation.invars[0].aval.shape[:1] == _COUNTED[:1]:
      counts[KINDS[name]] += equation.outvars[0].aval.size
    for inner in jaxprs_in_params(equation.params):
      _add_moved(inner, counts)


def speed(
  send: Send,
  *,
  mixer: str,
  model: str,
  batch_size: int,
  sizes: Sequence[int] | None,
  **_: Any,
) -> None:
  """Sends what the programs of each size need, in float32."""
  is_cpu = jax.devices()[0].platform == "cpu"
  rate = timing.matmul_rate(jnp.float32, 2048 if is_cpu else 8192)
  for size in sizes or (SIZES if is_cpu else (*SIZES, LARGEST)):
    config = _experiment(mixer, model, batch_size)
    for name in network.PROGRAMS:
      program = network.compile_program(name, config, size)
      measured = dataclasses.asdict(network.measure(program, rate))
      send(
        {
          "size": size,
          "program": name,
          "compile_seconds": program.compile_seconds,
          **measured,
        }
      )


def moved_bytes(
  send: Send, *, mixer: str, sizes: Sequence[int] | None, **_: Any
) -> None:
  """Sends the bytes an image of programs compiled for each target."""
  topology.use_compilers()
  for target in TARGETS:
    device = topology.devices_of(target)[0]
    sharding = SingleDeviceSharding(device)
    with topology.as_default_device(target):
      for size in sizes or SIZES:
        batch_size = COMPILED_PIXELS // size**2
        config = _experiment(
          mixer, COMPILED_MODEL, batch_size, dtype="bfloat16"
        )
        function, state = network.inference(config)
        images = jax.ShapeDtypeStruct((batch_size, size, size, 3), "float32")
        arguments = jax.tree.map(partial(_placed, sharding), (state, images))
        compiled = jax.jit(function).lower(*arguments).compile()
        launches = hlo.Program(compiled.as_text() or "").launches()
        send(
          {
            "target": target,
            "size": size,
            "bytes": hlo.total_bytes(launches) / batch_size,
            "launches": hlo.total_launches(launches),
          }
        )


def _placed(sharding, x):
  return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def accuracy(
  send: Send,
  *,
  mixer: str,
  seeds: Sequence[int],
  workdir: pathlib.Path,
  **_: Any,
) -> None:
  """Trains on the digits, and sends the top-1 of each seed's last weights."""
  import configs.digits
  from spatial_mamba_jax.training.loop import train

  for seed in seeds:
    config = configs.digits.get_config()
    config.model.mixer = dataclasses.replace(variants()[mixer])
    config.seed = seed
    directory = workdir / mixer / str(seed)
    train(config, directory)
    log = (directory / "metrics.jsonl").read_text().splitlines()
    records = [x for x in map(json.loads, log) if x["kind"] == "evaluation"]
    send({"seed": seed, "top1": records[-1]["top1"]})


SECTIONS: dict[str, Callable[..., None]] = {
  "cost": cost,
  "speed": speed,
  "bytes": moved_bytes,
  "accuracy": accuracy,
}


def _experiment(
  mixer: str, model: str, batch_size: int, dtype: str = "float32"
) -> TrainConfig:
  return network.experiment(
    model, batch_size=batch_size, dtype=dtype, mixer=variants()[mixer]
  )
