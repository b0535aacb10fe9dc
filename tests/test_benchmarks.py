"""The benchmarks run, and their counts equal counts by hand."""

import dataclasses
import json
import re
import sys
import types

import jax
import jax.numpy as jnp
import pytest
import spatial_mamba_kernels as smk
from spatial_mamba_kernels.case import Sizes
from spatial_mamba_kernels.gpu import device as gpu_device

from benchmarks import (
  ablation,
  aot,
  device,
  network,
  operators,
  peers,
  processes,
  profile,
  sections,
  table,
  tpu_code,
  traffic,
)
from benchmarks import input as input_speed
from benchmarks import model as benchmark
from spatial_mamba_jax.forecast import hlo
from spatial_mamba_jax.models.presets import get_model_config
from spatial_mamba_jax.training.config_file import load_config
from tests import broken_work


@pytest.mark.parametrize(
  ("size", "gmac"), [("tiny", 4.43), ("small", 7.07), ("base", 15.72)]
)
def test_flops_are_those_of_the_paper(size, gmac):
  config = get_model_config(f"spatial_mamba_{size}")
  assert network.forward_flops(config, 224) == pytest.approx(
    2e9 * gmac, rel=0.01
  )


@pytest.mark.parametrize("part", ablation.PARTS)
def test_ablation_switches_each_part_off(part):
  recipe = load_config("configs/digits_recipe.py")
  changed = ablation.without(recipe, ablation.PARTS[part])
  changed.validate()
  assert (changed == recipe) == (part == "nothing")


def run(main, monkeypatch, capsys, *arguments):
  """Runs a benchmark and returns what it prints."""
  monkeypatch.setattr(sys, "argv", ["benchmark", *map(str, arguments)])
  main()
  return capsys.readouterr().out


@pytest.mark.soak
def test_model_benchmark(monkeypatch, capsys):
  out = run(
    benchmark.main,
    monkeypatch,
    capsys,
    *("--model=spatial_mamba_micro", "--batch-size=2", "--size=32", "--json"),
    "--programs=inference",
  )
  measured = json.loads(out)["inference"]
  assert measured["images_per_second"] > 0
  assert 0 < measured["matmul_share"] < 1
  assert measured["peak_bytes"] > 1e6


def test_input_benchmark(monkeypatch, capsys):
  # Without worker processes, which would import this test.
  monkeypatch.setattr(input_speed, "workers_speed", lambda *_: 1.0)
  monkeypatch.setattr(input_speed, "SYNTHETIC_IMAGES", 8)
  monkeypatch.setattr(input_speed, "DISTINCT", 2)
  sizes = ("--images=8", "--batch_size=4", "--image_size=32", "--json")
  copy = "--photo_size=600x400", "--max_side=300"
  out = run(input_speed.main, monkeypatch, capsys, *sizes, *copy)
  measured = json.loads(out)
  seconds = measured["seconds_an_image"]
  assert list(seconds)[-2:] == ["whole pipeline", "Pillow's decode and resize"]
  assert min(seconds.values()) > 0
  assert measured["share_of_pillow"] == pytest.approx(
    seconds["Pillow's decode and resize"] / seconds["whole pipeline"]
  )
  assert measured["copy"]["bytes"] < measured["bytes"]
  assert 30 < measured["copy"]["least_psnr"] <= measured["copy"]["psnr"] < 60


@pytest.fixture
def two_blocks(monkeypatch):
  """Shrinks every experiment to two blocks, which compile in seconds."""
  experiment = network.experiment

  def small(*arguments, **options):
    config = experiment(*arguments, **options)
    config.model.dims, config.model.depths = (4, 4), (1, 1)
    return config

  monkeypatch.setattr(network, "experiment", small)


@pytest.mark.soak
def test_profile(monkeypatch, capsys, two_blocks):
  monkeypatch.setenv("XLA_FLAGS", "")
  out = run(
    profile.main,
    monkeypatch,
    capsys,
    *("--model=spatial_mamba_micro", "--batch-size=2", "--size=32"),
  )
  assert out.count("| longest | ms |") == 2
  for table_of_program in out.split("| spatial_mamba_micro at 32, ")[1:]:
    by_kind = table_of_program.split("| longest |")[0]
    shares = dict(
      re.findall(r"^\| (.*?) \| [\d.]+ \| ([\d.]+) ", by_kind, re.M)
    )
    whole = float(shares.pop("all"))
    assert {"structure-aware SSM", "linear layers", "convolutions"} < set(
      shares
    )
    assert "unknown" not in shares
    assert whole == 1
    assert sum(map(float, shares.values())) == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize(
  ("device", "line"), [("GPU", "Stream #7"), ("TPU", "XLA Ops")]
)
def test_profile_of_an_accelerator(device, line):
  """A fusion that runs twice, a loop around it, and a library's kernel."""
  text = """\
HloModule jit_f

%body (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  ROOT %fusion.1 = f32[8]{0} negate(%x), metadata={op_name="Mlp.up/neg"}
}

%condition (y: f32[8]) -> pred[] {
  %y = f32[8]{0} parameter(0)
  ROOT %go = pred[] constant(true)
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %a = f32[8]{0} parameter(0)
  ROOT %while.2 = f32[8]{0} while(%a), condition=%condition, body=%body, \
backend_config={"known_trip_count":{"n":"2"}}
}
"""

  def event(name, nanoseconds, **stats):
    if device == "TPU":
      name, stats = f"%{name} = f32[8]{{0}} negate(%x)", {}
    return types.SimpleNamespace(
      name=name, duration_ns=nanoseconds, stats=stats.items()
    )

  events = [
    event("fusion.1", 3e6, hlo_op="fusion.1"),
    event("fusion.1", 3e6, hlo_op="fusion.1"),
    event("while.2", 9e6, hlo_op="while.2"),
    event("cublas", 6e6),
  ]
  lines = [
    types.SimpleNamespace(name=line, events=events),
    types.SimpleNamespace(name="Steps", events=[event("step", 9e6)]),
  ]
  planes = [
    types.SimpleNamespace(name="/host:CPU", lines=lines),
    types.SimpleNamespace(name=f"/device:{device}:0", lines=lines),
  ]
  spans = profile.sum_spans(types.SimpleNamespace(planes=planes))
  by_kind, longest = profile.rows(hlo.Program(text), spans)
  calls = profile.CALLS
  row = profile.Row("linear layers", 6e-3 / calls, 2, 2 * 64)
  assert by_kind[0] == profile.Row("all", 12e-3 / calls, 3, 2 * 64)
  assert by_kind[1:] == [row, profile.Row("unknown", 6e-3 / calls, 1, 0)]
  assert [x.name for x in longest] == [
    "fusion.1 (linear layers)",
    "cublas (unknown)",
  ]


@pytest.fixture
def in_this_process(monkeypatch):
  """Runs the device benchmark in this process, where tests can patch it."""

  def messages(work, *, patience):
    del patience
    sent = []
    try:
      work(sent.append)
    except RuntimeError as error:
      yield from sent
      raise processes.EndedError from error
    yield from sent

  monkeypatch.setattr(processes, "messages", messages)


@pytest.mark.soak
def test_device_benchmark(
  monkeypatch, capsys, tmp_path, two_blocks, in_this_process
):
  file = tmp_path / "device.json"
  run(device.main, monkeypatch, capsys, "--scale=test", "--output", file)
  record = json.loads(file.read_text())
  assert record["versions"]["jax"] == jax.__version__
  assert [x["program"] for x in record["networks"]] == ["inference", "train"]
  programs = [x["program"] for x in record["segmentors"]]
  assert programs == ["backbone", "inference", "train"]
  for measured in (*record["networks"], *record["segmentors"]):
    assert 0 < measured["matmul_share"] < 1
  # Nine operators in two precisions and one in one, of two implementations,
  # and two scans of a third.
  assert len(record["operators"]) == 52
  for measured in record["operators"]:
    assert measured["ok"]
    assert measured["backward"]["seconds"] > 0
  table_of_file = run(table.main, monkeypatch, capsys, file)
  assert table_of_file.count("| structure_aware_ssm, ") == 2
  assert "| micro at 32, batch 2, train, default |" in table_of_file
  assert "| UPerNet on micro at 32 x 64, batch 2, inference |" in table_of_file
  assert "wrong" not in table_of_file


def test_the_measurements_page_has_the_recorded_figures():
  page = device.RESULTS.parents[1] / "docs" / "measurements.md"
  text = page.read_text()
  files = list(device.RESULTS.glob("*-jax-*.json"))
  assert files
  for file in files:
    assert "\n".join(table.networks(json.loads(file.read_text()))) in text


def _off(kernels):
  return 0.1


def _without_a_derivative(kernels):
  return 0 * jnp.sqrt(0 * kernels.sum())


@pytest.mark.parametrize("error", [_off, _without_a_derivative])
def test_a_wrong_operator_fails_the_device_benchmark(
  monkeypatch, capsys, tmp_path, in_this_process, error
):
  def wrong(**arrays):
    y = smk.state_fusion(**arrays)
    return y + jnp.asarray(error(arrays["kernels"]), y.dtype)

  fusion = operators.OPERATORS["state_fusion"]
  fusion = dataclasses.replace(fusion, function=wrong)
  monkeypatch.setattr(operators, "OPERATORS", {"state_fusion": fusion})
  file = tmp_path / "device.json"
  with pytest.raises(SystemExit, match="2 operators are wrong"):
    run(
      device.main,
      monkeypatch,
      capsys,
      *("--scale=test", "--sections", "operators", "--output", file),
    )
  assert "default is wrong" in run(table.main, monkeypatch, capsys, file)


@pytest.mark.parametrize(
  "op",
  [
    "relu_depthwise_conv",
    *(x.name for x in operators.OPERATORS.values() if x.roundings > 4),
  ],
)
def test_rounding_is_no_error(op):
  case = operators.Case(op, (1, 7, 7, 1024), "bfloat16")
  for measured in operators.measure(case, operators.compile_case, 1e9):
    # On a CPU, XLA sums the cotangents of a bias in half precision.
    errors = {k: x for k, x in measured["errors"].items() if k != "bias"}
    assert max(errors.values()) <= case.tolerance, errors


@pytest.mark.parametrize("still_computes", [True, False])
def test_a_failure_is_listed_and_the_rest_is_measured(
  monkeypatch, capsys, tmp_path, in_this_process, still_computes
):
  monkeypatch.setattr(sections, "_computes", lambda: still_computes)

  def failing(**arrays):
    del arrays
    raise RuntimeError("no memory")

  cases = {
    name: operators.OPERATORS[name]
    for name in ("selective_scan", "state_fusion")
  }
  cases["selective_scan"] = dataclasses.replace(
    cases["selective_scan"], function=failing
  )
  monkeypatch.setattr(operators, "OPERATORS", cases)
  file = tmp_path / "device.json"
  with pytest.raises(SystemExit, match="failed: Case"):
    run(
      device.main,
      monkeypatch,
      capsys,
      *("--scale=test", "--sections", "operators", "--output", file),
    )
  record = json.loads(file.read_text())
  assert set(record["failed"].values()) == {"RuntimeError: no memory"}
  assert {x["op"] for x in record["operators"]} == {"state_fusion"}
  assert len(record["failed"]) == 2  # In two precisions.
  assert "Failed: Case" in run(table.main, monkeypatch, capsys, file)


def test_checks_multiply_in_full_precision():
  """Also in kernels, which are traced when a program is lowered."""

  case = operators.Case("projected_depthwise_conv", (1, 3, 3, 8), "float32")
  texts = [x.as_text() for x in operators._lower(case, "default")]
  products = re.findall(r".*dot_general.*", "\n".join(texts))
  assert len(products) == 4  # Of two forward passes, and of the backward pass.
  for product in products:
    assert "precision = [HIGHEST, HIGHEST]" in product


def test_a_measurement_after_the_deadline_is_listed(
  monkeypatch, capsys, tmp_path
):
  """In a process of its own, as users run it."""
  file = tmp_path / "device.json"
  run(
    device.main,
    monkeypatch,
    capsys,
    *("--scale=test", "--minutes", 0, "--sections", "networks"),
    *("--output", file),
  )
  record = json.loads(file.read_text())
  assert record["matmul_flops"] > 0
  assert not record["networks"]
  assert "spatial_mamba_micro 32  train" in record["left_out"]


@pytest.mark.soak
def test_a_crash_and_a_hang_cost_one_measurement_each(
  monkeypatch, capsys, tmp_path
):
  monkeypatch.setattr(sections, "work", broken_work.work)
  monkeypatch.setattr(device, "PATIENCE_SECONDS", 10)
  file = tmp_path / "device.json"
  arguments = ("--sections", "networks", "--output", file)
  with pytest.raises(SystemExit, match="failed: crash, hang"):
    run(device.main, monkeypatch, capsys, *arguments)
  record = json.loads(file.read_text())
  assert record["networks"] == [{"label": "first"}, {"label": "last"}]
  assert record["failed"] == {
    "crash": "its process ended with status 3",
    "hang": "nothing came for 10 s",
  }


def test_a_section_that_never_begins(monkeypatch, capsys, tmp_path):
  monkeypatch.setattr(sections, "work", broken_work.never_begins)
  file = tmp_path / "device.json"
  arguments = ("--sections", "networks", "peers", "--output", file)
  with pytest.raises(SystemExit, match="failed: networks, peers"):
    run(device.main, monkeypatch, capsys, *arguments)
  record = json.loads(file.read_text())
  assert set(record["failed"].values()) == {"its process ended with status 5"}


def test_one_program_at_a_time(monkeypatch, capsys, tmp_path, in_this_process):
  """After a crash during compilation, programs are compiled one by one."""
  compiled = []

  def crash(*arguments):
    compiled.append(arguments)
    raise RuntimeError

  monkeypatch.setattr(sections, "_compile_together", crash)
  fusion = operators.OPERATORS["state_fusion"]
  monkeypatch.setattr(operators, "OPERATORS", {"state_fusion": fusion})
  file = tmp_path / "device.json"
  arguments = ("--scale=test", "--sections", "operators", "--output", file)
  run(device.main, monkeypatch, capsys, *arguments)
  record = json.loads(file.read_text())
  assert len(compiled) == 1
  assert len(record["operators"]) == 4
  assert not record["failed"]


def test_another_device_is_not_measured():
  with pytest.raises(RuntimeError, match="there is no TPU v5e any more"):
    sections.work(
      print,
      section="networks",
      scale="test",
      machine={"device": "TPU v5e", "scale": "test"},
      begun=(),
      together=True,
      deadline=0,
    )


def test_a_lost_device_is_noticed(monkeypatch):
  def lost(x):
    raise jax.errors.JaxRuntimeError("INTERNAL: an illegal memory access")

  assert sections._computes()
  monkeypatch.setattr(jax, "block_until_ready", lost)
  assert not sections._computes()


def test_a_machine_without_a_device_is_one_line(monkeypatch, capsys, tmp_path):
  monkeypatch.setattr(sections, "work", broken_work.dead)
  with pytest.raises(SystemExit, match="ended with status 4"):
    run(device.main, monkeypatch, capsys, "--output", tmp_path / "device.json")


@pytest.mark.parametrize(
  ("main", "arguments", "complaint"),
  [
    (
      table.main,
      ["none.json"],
      "none.json is not what benchmarks.device writes",
    ),
    (benchmark.main, ["--implementation=fast"], "invalid choice: 'fast'"),
    (peers.main, ["--models=resnet50"], "invalid choice: 'resnet50'"),
  ],
)
def test_wrong_arguments(monkeypatch, capsys, main, arguments, complaint):
  with pytest.raises(SystemExit):
    run(main, monkeypatch, capsys, *arguments)
  assert complaint in capsys.readouterr().err


def test_a_file_of_another_kind(monkeypatch, capsys, tmp_path):
  file = tmp_path / "other.json"
  file.write_text('{"device": "cpu"}')
  with pytest.raises(SystemExit):
    run(table.main, monkeypatch, capsys, file)
  assert "KeyError('versions')" in capsys.readouterr().err


@pytest.mark.parametrize("family", traffic.FAMILIES, ids=" ".join)
def test_kernels_are_switched_off_by_family(family, monkeypatch):
  hopper = types.SimpleNamespace(compute_capability="9.0")
  monkeypatch.setattr(gpu_device, "get_default_device", lambda: hopper)
  case = operators.OPERATORS[family[-1]]

  def kernels():
    def gradients(arrays):
      y, pullback = jax.vjp(lambda arrays: case.function(**arrays), arrays)
      return pullback(y)

    shapes = case.shapes(Sizes(2, 4, 4, 128), "bfloat16")
    traced = jax.jit(gradients).trace(shapes)
    program = traced.lower(lowering_platforms=("cuda",)).as_text()
    return program.count("@mosaic_gpu")

  with aot.without_kernels(family):
    assert not kernels()
  assert kernels()


@pytest.mark.parametrize("target", ["v0e:2x2", "H200:none"])
def test_an_unknown_target_is_refused(target):
  with pytest.raises(SystemExit, match=f"nothing here .*{target}"):
    aot._mesh(target)


def test_bundles_of_loops_are_counted():
  """Two loops in the grid's, the first run three times.

  Empty bundles count, and so does one in the loop of what follows it.
  """
  text = """\
  0x12   :  { %s1 = smov 0 }
  0x14 LB: > { %s2 = sadd.s32 1, %s3 /* iteration index */
     a comment that goes on */ }
  0x15 LB: >> { %v1 = vadd.f32 %v2, %v3 }
  0x15   : > { %s9 = smov (%p8), 32 }
  0x16   :  {}
  0x17   : >> { %p1 = scmp.ge.s32 (%p8), %s4, 3 /* loop exit test */ }
  0x18 PF: > { %s5 = sld [smem:[#allocation1]] }
  0x19 LB: >> { %v4 = vmul.f32 %v5, %v6 }
  0x1a   : > { %p2 = scmp.ge.s32.totalorder %s6, 976 /* loop exit test */ }
  0x1b   :  { %s7 = smov 0 }
"""
  exit_test = "scmp.ge.s32 %s8, 2 /* loop exit test */"
  with pytest.raises(ValueError, match="cannot tell how often"):
    tpu_code.count_bundles(text)  # The second loop.
  text = text.replace("vmul.f32 %v5, %v6", exit_test)
  counted = tpu_code.count_bundles(text)
  assert counted == {"loops": [(3, 4), (2, 1)], "step_bundles": 3 + 3 * 4 + 2}


def test_bytes_that_a_kernel_moves_are_counted():
  """Of 6 rows by hand: each comes once, C and y five rows behind."""
  shape = (8, 6, 7, 128, 1)
  function, arguments = aot.program(
    "structure_aware_ssm", "forward", shape, "bfloat16"
  )
  row = 8 * 7 * 128 * 2  # One of images,
  lanes = 8 * 128 * 2  # of numbers, the tokens filled up to 128,
  state = 8 * 128 * 4  # and the states that a row leaves.
  parameters = (1 + 1 + 25 + 1) * 128 * 4
  expected = 6 * (3 * row + 2 * lanes + state) + parameters
  assert tpu_code.moved_bytes(function, arguments) == expected
