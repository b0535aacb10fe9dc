"""Speed, memory and traces of a run, on devices that are not there."""

import math
import types

import jax
import jax.numpy as jnp
import pytest

from spatial_mamba_jax.data import DataConfig
from spatial_mamba_jax.hardware import by_name
from spatial_mamba_jax.models.flops import count_flops
from spatial_mamba_jax.tasks.classification import ClassificationConfig
from spatial_mamba_jax.training.config import (
  ModelSection,
  OptimizerConfig,
  TrainConfig,
  TrainingError,
)
from spatial_mamba_jax.training.goodput import Ledger
from spatial_mamba_jax.training.memory import measured_line, planned_line
from spatial_mamba_jax.training.profiling import StepTrace, parse_steps
from spatial_mamba_jax.training.program import make_program
from spatial_mamba_jax.training.sharding import make_mesh
from spatial_mamba_jax.training.speed import (
  Speed,
  image_flops,
  peak_flops,
  speed_of,
)


def make(**changes):
  config = TrainConfig(
    task=ClassificationConfig(num_classes=3),
    model=ModelSection(dims=(4, 8), depths=(1, 1)),
    data=DataConfig(name="synthetic", image_size=16, synthetic_images=24),
    optimizer=OptimizerConfig(warmup="1 epoch"),
    batch_size=8,
    length="2 epochs",
    **changes,
  )
  return make_program(config, make_mesh(config.mesh), train_examples=24)


@pytest.fixture(scope="module")
def program():
  return make(mesa_weight=1.0)


def forward_flops(program):
  """FLOP of inference on one image."""
  batch = program.task.examples().blank(train=False)
  batch = {name: jnp.asarray(x)[None] for name, x in batch.items()}

  def predict(weights, batch):
    return program.model.apply(
      weights, lambda network: program.task.predict(network, batch), train=False
    )

  return count_flops(predict, program.model.shapes, batch)


def test_flops_of_an_image(program):
  """Three forward passes, without the teacher."""
  forward = forward_flops(program)
  assert forward > 0
  assert image_flops(program) == pytest.approx(3 * forward, rel=1e-6)
  probe = make(linear_probe=True, accumulation_steps=2)
  assert image_flops(probe) == pytest.approx(forward, rel=1e-6)


def test_the_peak_of_all_devices():
  devices = [types.SimpleNamespace(device_kind="TPU v5 lite")] * 4
  assert peak_flops(devices) == 4 * by_name("v5e").flops
  assert peak_flops(jax.devices("cpu")) is None


def test_speed_on_a_known_device():
  speed = Speed(image_flops=3e9, peak_flops=4e11)
  # Saves are not part of the speed.
  window = {"steps": 6.0, "input": 2.0, "save": 50.0}
  assert speed.of(80.0, window) == {
    "images_per_second": 10.0,
    "data_wait": 0.25,
    "model_flops_per_second": 3e10,
    "mfu": pytest.approx(0.075),
  }


def test_speed_on_an_unknown_device(program):
  speed = speed_of(program)
  assert speed == Speed(image_flops(program), None)
  unknown = speed.of(math.nan, {"steps": math.nan, "input": math.nan})
  assert list(unknown) == [
    *("images_per_second", "data_wait", "model_flops_per_second")
  ]
  assert all(map(math.isnan, unknown.values()))


def test_memory_planned_for_a_step():
  def step(x, y):
    return x + y[0]

  x, y = (jax.ShapeDtypeStruct((n,), jnp.float32) for n in (500_000, 250_000))
  line = planned_line(jax.jit(step, donate_argnums=0).lower(x, y).compile())
  # The result takes the place of x.
  start = "memory per device: planned 3 MB (3 MB for state and batch, "
  assert line.startswith(start)


def device(peak):
  stats = {"bytes_in_use": 1, "peak_bytes_in_use": peak, "bytes_limit": 16e9}
  return types.SimpleNamespace(memory_stats=lambda: stats)


def test_memory_in_use():
  line = "memory per device: at most 2.5 GB in use so far, of 16 GB"
  assert measured_line([device(1e9), device(2.5e9), device(2e9)]) == line
  silent = types.SimpleNamespace(memory_stats=lambda: None)
  assert measured_line([silent]) is None


@pytest.mark.parametrize(
  "text", ["", "100", "100:", "110:100", "0:5", "a:b", "1:2:3", "-1:5", "1.0:2"]
)
def test_wrong_steps_to_profile(text):
  with pytest.raises(TrainingError, match="must be the first and the last st"):
    parse_steps(text)


@pytest.fixture
def traced(monkeypatch, tmp_path):
  """Returns a function that takes steps, and returns those that are traced."""
  events = []
  profiler = jax.profiler
  monkeypatch.setattr(
    profiler, "start_trace", lambda path, **_: events.append("start")
  )
  monkeypatch.setattr(profiler, "stop_trace", lambda: events.append("stop"))

  def run(text, *, done, total):
    ledger = Ledger(tmp_path, 0.0)
    trace = StepTrace(
      parse_steps(text), tmp_path, ledger, done=done, total=total
    )
    for step in range(done + 1, total + 1):
      trace.before(step, None)
      events.append(step)
      trace.after(step, None)
    trace.close()
    if "start" not in events:
      return []
    return events[events.index("start") + 1 : events.index("stop")]

  return run


def test_steps_to_profile(traced, capsys):
  assert traced("3:5", done=0, total=9) == [3, 4, 5]
  assert "the trace is in" in capsys.readouterr().err


def test_steps_to_profile_of_a_resumed_run(traced):
  assert traced("3:5", done=4, total=9) == [5]


def test_steps_to_profile_at_the_end(traced):
  assert traced("9:9", done=0, total=9) == [9]


def test_steps_to_profile_that_are_done(traced, capsys):
  assert traced("3:5", done=5, total=9) == []
  assert capsys.readouterr().err == (
    "--profile_steps=3:5: the run is at step 5 already; no trace is written\n"
  )


def test_steps_to_profile_after_the_end(traced):
  with pytest.raises(TrainingError, match="=3:10: the run has 9 steps"):
    traced("3:10", done=0, total=9)


def test_no_steps_to_profile(traced, capsys):
  assert traced(None, done=2, total=4) == []
  assert capsys.readouterr().err == ""
