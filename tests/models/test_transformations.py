"""Models under the transformations of Flax and JAX."""

import copy
import os
import pathlib
import pickle
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import spatial_mamba_jax as smj

ROOT = pathlib.Path(__file__).parents[2]


def create(make=smj.create_model, *, mode="eval", **overrides):
  settings = {"dims": (4, 6), "depths": (1, 2), **overrides}
  if make is smj.create_backbone:
    settings["out_indices"] = range(len(settings["dims"]))
  model = make("spatial_mamba_micro", rngs=nnx.Rngs(0), **settings)
  getattr(model, mode)()
  return model


@pytest.fixture
def images():
  return jax.random.normal(jax.random.key(0), (2, 16, 16, 3))


def loss(call, *arguments):
  return jnp.sum(jnp.sin(call(*arguments)))


@nnx.jit
def call_compiled(model, images):
  return model(images)


@pytest.mark.parametrize(
  ("make", "mode"),
  [(smj.create_model, "train"), (smj.create_backbone, "eval")],
)
def test_a_table_of_the_model(make, mode, images):
  one_stage = {"dims": (4,), "depths": (2,)}
  model = create(make, mode=mode, drop_path_rate=0.2, **one_stage)

  def rngs():
    return {"rngs": nnx.Rngs(drop_path=0)} if mode == "train" else {}

  console = {"force_terminal": False, "width": 300}
  total = sum(x.size for x in jax.tree.leaves(nnx.state(model)))
  rows = []
  # The first model was never compiled, the second was.
  for depth in (1, None):
    table = nnx.tabulate(
      model, images, depth=depth, console_kwargs=console, **rngs()
    )
    assert f"Total Parameters: {total:,} " in table
    rows.append(table.count("├"))
    nnx.jit(lambda model, x: model(x, **rngs()))(model, images)
  assert "stages/0/blocks/0/mixer/in_proj" in table
  assert rows == sorted(set(rows))
  # Flax restores the methods that it wraps.
  for layer in (model.stem.conv1.conv, nnx.Linear(3, 2, rngs=nnx.Rngs(0))):
    layer(images)


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_copies_are_the_model(mode, images):
  model = create(mode=mode)
  # BatchNorm changes its statistics in training.
  expected = call_compiled(nnx.clone(model), images)
  for other in (
    nnx.clone(model),
    nnx.merge(*nnx.split(model)),
    nnx.merge(*nnx.split(model, nnx.Param, ...)),
    copy.deepcopy(model),
    pickle.loads(pickle.dumps(model)),
  ):
    assert nnx.graphdef(other) == nnx.graphdef(model)
    result = call_compiled(other, images)
    np.testing.assert_allclose(result, expected, rtol=1e-6, atol=1e-6)
  shape = nnx.eval_shape(lambda m, x: m(x), model, images)
  assert shape.shape == expected.shape
  assert repr(model).startswith("SpatialMamba(")


@pytest.mark.soak
@pytest.mark.usefixtures("x64")
def test_transformations_are_the_model(images):
  model = create(dtype="float64")
  images = images.astype(jnp.float64)
  graphdef, state = nnx.split(model)

  @jax.jit
  def run(state, images):
    def call(images):
      return nnx.merge(graphdef, state)(images)

    results = {
      "call": call(images),
      "vmap": jax.vmap(call)(images[:, None])[:, 0],
      "nnx.vmap": nnx.vmap(lambda m, x: m(x), in_axes=(None, 0))(
        nnx.merge(graphdef, state), images[:, None]
      )[:, 0],
      "map": jax.lax.map(lambda x: call(x[None])[0], images),
    }
    gradients = {
      "grad": jax.grad(partial(loss, call))(images),
      "checkpoint": jax.grad(partial(loss, jax.checkpoint(call)))(images),
    }
    weights = {
      "nnx.grad": nnx.grad(lambda m: loss(m, images))(
        nnx.merge(graphdef, state)
      ),
      "nnx.remat": nnx.grad(
        lambda m: loss(nnx.remat(lambda m, x: m(x)), m, images)
      )(nnx.merge(graphdef, state)),
    }
    return results, gradients, weights

  for results in run(state, images):
    first, *others = results.values()
    for other in others:
      for actual, expected in zip(
        jax.tree.leaves(other), jax.tree.leaves(first), strict=True
      ):
        np.testing.assert_allclose(actual, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
  "implementation",
  [None, pytest.param("associative", marks=pytest.mark.soak)],
)
def test_forward_mode_is_a_pullback_of_a_pullback(implementation, images):
  """The docstring of `spatial_mamba_kernels` shows it, because jvp fails."""
  model = create(dtype="float64", implementation=implementation, mode="train")
  graphdef, state = nnx.split(model)
  x = images.astype(jnp.float64)
  dx = jax.random.normal(jax.random.key(1), x.shape)

  @jax.jit
  def call(x):
    return nnx.merge(graphdef, state, copy=True)(x)

  @jax.jit
  def product(x, dx):
    y, pullback = jax.vjp(call, x)
    _, push = jax.vjp(lambda dy: pullback(dy)[0], jnp.zeros_like(y))
    return push(dx)[0]

  step = 1e-6
  expected = (call(x + step * dx) - call(x - step * dx)) / (2 * step)
  scale = np.abs(expected).max()
  np.testing.assert_allclose(product(x, dx), expected, atol=1e-6 * scale)
  with pytest.raises(TypeError, match="can't apply forward-mode"):
    jax.jvp(call, (x,), (dx,))


@pytest.mark.parametrize(
  "dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.soak)]
)
def test_compiled_programs_transfer_nothing_implicitly(dtype, images):
  key = jax.random.key(0)
  with jax.transfer_guard("disallow"):

    @jax.jit
    def train(key, images):
      """All of it: initialisation, both modes, gradients and states."""
      overrides = {"dtype": dtype, "drop_path_rate": 0.5, "rngs": nnx.Rngs(key)}
      config = {"dims": (4, 6), "depths": (1, 2), **overrides}
      model = smj.create_model("spatial_mamba_micro", **config)
      states = smj.block_states(model, images, 1, 1)
      logits = model(images)
      model.train()

      def loss(model):
        return jnp.sum(model(images, rngs=nnx.Rngs(drop_path=key)))

      return logits, states, nnx.grad(loss)(model)

    results = jax.device_get(train(key, images))
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(results))


EXPLICIT = """
import jax, jax.numpy as jnp, numpy as np
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import spatial_mamba_jax as smj

jax.config.update("jax_enable_x64", True)
images = np.random.default_rng(0).normal(size=(4, 13, 16, 3))

def value_and_gradients(graphdef, params, rest, images):
  def loss(params, images):
    model = nnx.merge(graphdef, params, rest, copy=True)
    y = model(images, rngs=nnx.Rngs(drop_path=jax.random.key(0)))
    return sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(y)), y
  return jax.value_and_grad(loss, (0, 1), has_aux=True)(params, images)

run = jax.jit(value_and_gradients, static_argnums=0)
settings = {"dims": (4, 6), "depths": (1, 1), "dtype": "float64"}
name, rngs = "spatial_mamba_micro", nnx.Rngs(0)
classifier = smj.create_model(
  name, rngs=rngs, drop_path_rate=0.5, d_state=2, **settings
)
classifier.train()
backbone = smj.create_backbone(
  name, rngs=rngs, out_indices=(0, 1), implementation="associative", **settings
)
for model, shape, names in (
  (classifier, (2, 2), ("data", "model")),
  (classifier, (2, 2), ("rows", "columns")),
  (backbone, (4,), ("data",)),
):
  graphdef, *weights = nnx.split(model, nnx.Param, ...)
  expected = run(graphdef, *weights, images)
  kinds = (AxisType.Explicit,) * len(names)
  mesh = jax.make_mesh(shape, names, axis_types=kinds)
  with jax.set_mesh(mesh):
    replicated = jax.device_put(weights, NamedSharding(mesh, P()))
    spec = P(names) if names[0] == "rows" else P("data")
    split = jax.device_put(images, NamedSharding(mesh, spec))
    actual = run(graphdef, *replicated, split)
  assert len(jax.tree.leaves(actual)[1].sharding.device_set) == 4
  (_, y), (dparams, dx) = actual
  assert all(jax.typeof(x).sharding.spec[0] for x in jax.tree.leaves((y, dx)))
  assert not any(
    any(jax.typeof(x).sharding.spec) for x in jax.tree.leaves(dparams)
  )
  scale = max(np.abs(x).max() for x in jax.tree.leaves(expected))
  for a, b in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
    np.testing.assert_allclose(np.asarray(a), b, rtol=1e-9, atol=1e-11 * scale)

# Axes that cannot be split are named.
mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Explicit,))
with jax.set_mesh(mesh):
  columns = jax.device_put(images, NamedSharding(mesh, P(None, None, "data")))
  try:
    nnx.jit(lambda model, x: model(x))(
      nnx.merge(graphdef, *jax.device_put(weights, NamedSharding(mesh, P()))),
      columns,
    )
  except NotImplementedError as error:
    assert "\\n" not in str(error) and "AxisType.Auto" in str(error)
    print("equal")
"""


@pytest.mark.soak
def test_a_mesh_of_explicit_axes_is_one_device():
  """Values and gradients agree; an axis that cannot be split is one line."""
  flag = " --xla_force_host_platform_device_count=4"
  result = subprocess.run(
    (sys.executable, "-c", EXPLICIT),
    env={
      **os.environ,
      "JAX_PLATFORMS": "cpu",
      "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}",
      "XLA_FLAGS": os.environ.get("XLA_FLAGS", "") + flag,
    },
    capture_output=True,
    check=False,
    text=True,
  )
  assert result.stdout == "equal\n", result.stderr
