"""A forecast's arithmetic against values by hand, and its messages."""

import dataclasses
import json
import subprocess
import sys
from unittest import mock

import jax
import pytest

from spatial_mamba_jax.forecast import (
  collectives,
  figure,
  hlo,
  measured,
  output,
  recipe,
  roofline,
)
from spatial_mamba_jax.forecast.compilation import Memory, Step
from spatial_mamba_jax.forecast.topology import TopologyError, accelerator_of
from spatial_mamba_jax.hardware import Accelerator
from spatial_mamba_jax.training.config import ModelSection, Schedule
from spatial_mamba_jax.training.program import Program
from tests.test_docs import ROOT

# 100 FLOP, 10 bytes of memory, 5 of links and 2 of the network, a second.
CHIP = Accelerator(
  name="chip",
  kinds=("TPU chip",),
  flops=100.0,
  memory=1000.0,
  memory_rate=10.0,
  link_rate=5.0,
  host_devices=4,
  cores=8,
  network_rate=8.0,
)
GROUPS = {
  "{{0,1},{2,3}}": ((0, 1), (2, 3)),
  "{}": ((0, 1, 2, 3),),
  "[2,2]<=[4]": ((0, 1), (2, 3)),
  "[2,2]<=[2,2]T(1,0)": ((0, 2), (1, 3)),
  "mesh['a'=2,'b'=2] {'a'}": ((0, 2), (1, 3)),
  "mesh['a'=2,'b'=2] {'a','b'}": ((0, 1, 2, 3),),
  "mesh['a'=4] {'a':(2)2}": ((0, 1), (2, 3)),
  "mesh['a'=4] {'a':(1)2}": ((0, 2), (1, 3)),
  "mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'a'}": ((0, 1), (2, 3)),
}
HEADER = "HloModule step, num_partitions=4\n\n"


def of_program(body):
  return collectives.collectives_of(hlo.Program(HEADER + body))


def entry(kind, groups):
  return f"""ENTRY %main (x: f32[8]) -> f32[8] {{
  %x = f32[8]{{0}} parameter(0)
  ROOT %y = f32[8]{{0}} {kind}(%x), channel_id=1, {groups}, dimensions={{0}}
}}
"""


@pytest.mark.parametrize("text", GROUPS)
def test_groups_of_every_form(text):
  (found,) = of_program(entry("all-reduce", f"replica_groups={text}"))
  assert found.groups == GROUPS[text]


@pytest.mark.parametrize(
  ("kind", "sent"),
  [
    # Of 32 bytes a device, among four.
    ("all-reduce", 2 * 32 * 3 / 4),
    ("reduce-scatter", 32 * 3 / 4),
    ("all-gather", 4 * 32 * 3 / 4),
    ("all-to-all", 32 * 3 / 4),
  ],
)
@pytest.mark.parametrize("suffix", ["", "-start"])
def test_bytes_that_a_device_sends(kind, sent, suffix):
  (found,) = of_program(entry(kind + suffix, "replica_groups={}"))
  assert (found.kind, found.sent) == (kind, sent)
  assert found.is_async == bool(suffix)
  assert collectives.total([found, found]) == {kind: (2, 2 * sent)}


def test_a_collective_of_one_device_is_none():
  assert not of_program(entry("all-reduce", "replica_groups={{0},{1},{2},{3}}"))


def test_a_fusion_of_an_all_reduce_with_its_slice_scatters():
  (found,) = of_program("""
%all-reduce-scatter.1 (p: f32[8]) -> f32[2] {
  %p = f32[8]{0} parameter(0)
  %r = f32[8]{0} all-reduce(%p), channel_id=1, replica_groups={}
  %i = s32[] constant(0)
  ROOT %s = f32[2]{0} dynamic-slice(%r, %i), dynamic_slice_sizes={2}
}

ENTRY %main (x: f32[8]) -> f32[2] {
  %x = f32[8]{0} parameter(0)
  ROOT %y = f32[2]{0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1
}
""")
  assert (found.kind, found.sent) == ("reduce-scatter", 32 * 3 / 4)


def test_what_slices_exchange():
  def exchange(slices, kind):
    attributes = (
      f'_xla_megascale_target="{{{slices}}}x{{0:3}}",'
      f'_xla_megascale_transfer_type="{kind}"'
    )
    found = of_program(f"""ENTRY %main (x: f32[8]) -> f32[8] {{
  %x = f32[8]{{0}} parameter(0)
  %t = token[] after-all()
  %s = (f32[8]{{0}}, token[]) send(%x, %t), attributes={{{attributes}}}
  ROOT %y = f32[8]{{0}} copy(%x)
}}
""")
    return roofline.sent_by_device(found, [0] * 4)

  assert exchange("1,2", "ALL_REDUCE") == (0, 2 * 32 / 2)
  assert exchange("1:4", "ALL_REDUCE") == (0, 2 * 32 * 3 / 4)
  assert exchange("1,2", "ONE_TO_ONE") == (0, 32)


def test_only_a_share_of_an_array_crosses_the_network():
  group = (tuple(range(8)),)
  each = collectives.Collective("all-reduce", 64, group, 3, False)
  # Two hosts of four: 64 bytes are summed among four, then 16 between two.
  sent = roofline.sent_by_device([each], [0] * 4 + [1] * 4)
  assert sent == (3 * 2 * 64 * 3 / 4, 3 * 2 * 16 / 2)
  assert roofline.sent_by_device([each], [0] * 8) == (each.sent, 0)
  # Each device has 8 bytes for each other one, of which four are far away.
  each = dataclasses.replace(each, kind="all-to-all")
  sent = roofline.sent_by_device([each], [0] * 4 + [1] * 4)
  assert sent == (3 * 3 * 8, 3 * 4 * 8)


def test_a_step_takes_its_longer_half_and_all_collectives():
  work = roofline.Work(flops=300.0, memory=20.0, link=5.0, network=4.0)
  time = roofline.step_time(work, CHIP)
  # Four chips share the 8 bytes a second of their host.
  assert time == roofline.StepTime(
    compute=3.0, memory=2.0, link=1.0, network=2.0
  )
  assert (time.total, time.bound) == (3 + 1 + 2, "compute")
  assert roofline.mfu(150.0, time.total, CHIP) == 150 / 600


def test_mesa_counts_from_its_first_step():
  assert recipe.recipe_seconds(2.0, 3.0, 10, 4) == 4 * 2 + 6 * 3
  assert recipe.recipe_seconds(2.0, 3.0, 10, None) == 20


def forecast(*, temporaries=100, work=300.0, cores=8, price=None, devices=8):
  step = Step(
    target="chip:8",
    accelerator=dataclasses.replace(CHIP, cores=cores),
    devices=devices,
    hosts=2,
    mesh={"replica": 1, "data": 8, "fsdp": 1},
    times=Schedule(
      epoch=10, steps=100, warmup=1, evaluate_every=1, log_every=1, mesa_from=50
    ),
    batch_size=80,
    image_flops=15.0,
    memory=Memory(200, 400, 200, 50, temporaries),
    before=roofline.Work(work, 20.0, 5.0, 4.0),
    after=roofline.Work(2 * work, 20.0, 5.0, 4.0),
    collectives={"all-reduce": (3, 4e6)},
    asynchronous=1,
    scheduled=3,
    program=mock.create_autospec(Program, instance=True),
    compiled=mock.create_autospec(jax.stages.Compiled, instance=True),
  )
  return recipe.forecast(step, price=price, images_per_core=2.0)


def test_a_recipe():
  found = forecast(price=3.0)
  assert found.seconds == 50 * 6 + 50 * 9  # See the times of a step above.
  assert found.images_per_second == 80 * 100 / 750
  assert found.chip_hours == 750 / 3600 * 8
  assert found.price == 3 * found.chip_hours
  # 10 images of 15 FLOP a chip, in 7.5 s at 100 FLOP/s.
  assert found.mfu == pytest.approx(150 / 750)
  # 80 images in 6 s, of 2 hosts, at 2 images a core.
  assert found.input_cores == pytest.approx(80 / 6 / 2 / 2)
  assert not found.problems


def test_what_does_not_fit():
  (problem,) = forecast(temporaries=151).problems
  assert "needs 0.0 GB" in problem
  assert "config.mesh.fsdp" in problem
  (problem,) = forecast(cores=2).problems
  assert problem.startswith(
    "the input needs up to 3 cores a host and a host has 2"
  )


def test_text_has_every_part_and_json_is_plain():
  found = forecast(price=3.0, cores=2)
  text = output.text(found)
  for part in ("moments", "network", "all-reduce", "MFU 20.0%", "price 5.00"):
    assert part in text
  assert "this cannot run: the input" in text
  assert all(line in text for line in output.assumptions(found))
  plain = json.loads(json.dumps(output.to_json(found)))
  assert plain["step_seconds"]["after"]["total"] == 9
  assert plain["problems"] == found.problems


def test_a_table_and_a_plot_of_several():
  found = [forecast(devices=16), forecast(cores=2, devices=8)]
  _, _, first, second = output.table(found).splitlines()
  assert "| 8 |" in first
  assert first.endswith("| no |")
  assert second.endswith("| yes |")
  days, cost = figure.draw(found).axes
  assert list(days.lines[0].get_xdata()) == [8, 16]
  assert list(days.lines[1].get_xdata()) == [8]  # The cross.
  assert cost.get_title() == "Chip-hours, at least"


def test_a_measurement_of_the_same_step_is_compared(tmp_path):
  found = forecast()
  object.__setattr__(found.step, "program", mock.MagicMock())
  config = found.step.program.config
  config.model = ModelSection(name="spatial_mamba_tiny", drop_path_rate=0.2)
  config.data.image_size = 224
  network = {
    "program": "train",
    "model": "spatial_mamba_tiny",
    "size": 224,
    "implementation": "default",
  }
  file = tmp_path / "chip.json"

  def ratios(device, batch_size):
    networks = [network | {"batch_size": batch_size, "images_per_second": 2.0}]
    record = {"device": device, "dtype": "float32", "networks": networks}
    file.write_text(json.dumps(record))
    return measured.ratios(found, tmp_path)

  # Ten images a chip, in 3 s.
  (line,) = ratios("TPU chip", 10)
  assert line.endswith("the roofline says 3, 1.67 times as many")
  assert not ratios("TPU chip", 20)
  assert not ratios("cpu", 10)
  config.model.dims = (8, 8, 8, 8)
  assert not ratios("TPU chip", 10)


def test_gpus_have_the_share_that_jax_takes(monkeypatch):
  step = forecast().step
  gpu = dataclasses.replace(CHIP, kinds=("NVIDIA chip",))
  object.__setattr__(step, "accelerator", gpu)
  monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
  assert recipe.usable_memory(step) == 750
  monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")
  assert recipe.usable_memory(step) == 900


def test_an_accelerator_without_figures_is_refused():
  assert accelerator_of("2xv5e:16x16").name == "v5e"
  assert accelerator_of("H200:8").name == "h200"
  with pytest.raises(TopologyError, match="no figures for v0e"):
    accelerator_of("v0e:2x2")
  with pytest.raises(TopologyError, match="no forecast for a v4"):
    accelerator_of("v4:2x2x1")
  for target in ("0xv5e:2x2", "2xh200:8"):
    with pytest.raises(TopologyError, match="only TPUs have slices"):
      accelerator_of(target)


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    # Nothing here compiles for TPUs; with libtpu there is no such slice.
    (["--topology=v5e:3x7x2"], "nothing here compiles for v5e:3x7x2"),
    ([], "--topology=NAME is needed"),
    (
      ["--topology=v5e:2x2", "--save=no/step.bin"],
      "--save=no/step.bin cannot be written",
    ),
  ],
)
def test_a_mistake_is_one_line(arguments, message):
  process = subprocess.run(
    (
      *(sys.executable, "-m", "spatial_mamba_jax.forecast"),
      *("--config=configs/digits.py", *arguments),
    ),
    cwd=ROOT,
    env={"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "PATH": ""},
    capture_output=True,
    text=True,
  )
  (line,) = process.stderr.splitlines()[-1:]
  assert line.startswith(f"forecast: {message}")
  assert "Traceback" not in process.stderr
  assert process.returncode == 2
