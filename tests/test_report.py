"""The report of a run: every logged value drawn, everything escaped."""

import base64
import html.parser
import io
import json
import re

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from spatial_mamba_jax.report import draw, main, read_run
from spatial_mamba_jax.tasks.classification.panels import COLUMNS, PANELS

VALUES = {
  "loss": 2.0,
  "accuracy": 0.5,
  "grad_norm": 3.0,
  "learning_rate": 1e-3,
  "images_per_second": 400.0,
  "mfu": 0.5,
  "data_wait": 0.25,
}
# The drawn values, in the panels' units.
DRAWN = {**VALUES, "accuracy": 50.0, "mfu": 50.0, "data_wait": 25.0}
RUN = {
  "config": {"length": "4 epochs", "model": {"name": "tiny"}},
  "epoch_steps": 10,
  "steps": 40,
  # NaN in JSON.
  "task": {
    "kind": "classification",
    "score": "top1",
    "panels": [panel._asdict() for panel in PANELS],
    "columns": COLUMNS,
  },
  "versions": {"jax": "0.10.2"},
  "commit": "0123abc",
  "devices": ["TPU v5e"] * 8,
}


def train(step, **values):
  return {"step": step, "kind": "train", **{**VALUES, **values}}


def evaluation(step, top1, kind="evaluation"):
  numbers = {"top1": top1, "top5": 0.9, "loss": 1.5, "ece": 0.0123}
  return {"step": step, "kind": kind, **numbers, "images": 297}


def write(workdir, records, run=RUN):
  lines = "".join(json.dumps(record) + "\n" for record in records)
  (workdir / "metrics.jsonl").write_text(lines)
  if run is not None:
    (workdir / "run.json").write_text(json.dumps(run))


class Page(html.parser.HTMLParser):
  """Collects the tags, links and table cells of a page."""

  def __init__(self, text):
    super().__init__()
    self.tags, self.sources, self.rows = [], [], []
    self.alternatives, self.facts = [], []
    self.text, self._in_cell, self._in_facts = "", False, False
    self.feed(text)

  def handle_starttag(self, tag, attrs):
    self.tags.append(tag)
    self.sources += [value for name, value in attrs if name in ("src", "href")]
    self.alternatives += [value for name, value in attrs if name == "alt"]
    if tag == "tr":
      self.rows.append([])
    if tag in ("td", "th"):
      self.rows[-1].append("")
      self._in_cell = True
    if tag == "dt":
      self.facts.append([])
    self._in_facts |= tag == "dl"

  def handle_endtag(self, tag):
    if tag in ("td", "th"):
      self._in_cell = False
    self._in_facts &= tag != "dl"

  def handle_data(self, data):
    self.text += data
    if self._in_cell:
      self.rows[-1][-1] += data
    if self._in_facts and data.strip():
      self.facts[-1].append(data)


def report(workdir, capsys):
  """Runs the command; returns the page and the picture."""
  assert main([str(workdir)]) == 0
  paths = [workdir / "report.png", workdir / "report.html"]
  assert capsys.readouterr().out.split() == list(map(str, paths))
  page = Page(paths[1].read_text())
  png = paths[0].read_bytes()
  assert not page.sources
  assert "script" not in page.tags
  assert all(cell for row in page.rows for cell in row)
  # No partial file is left.
  assert {path.name for path in workdir.iterdir()} <= {
    *("metrics.jsonl", "run.json", "goodput.jsonl"),
    *("report.png", "report.html"),
  }
  return page, Image.open(io.BytesIO(png))


def drawn(workdir):
  """Returns {(panel, line): (steps, values)} of the figure."""
  return {
    (axes.get_title(loc="left"), line.get_label().replace("_child0", "")): (
      line.get_data()
    )
    for axes in draw(read_run(workdir)).axes
    for line in axes.get_lines()
  }


def test_every_logged_value_is_drawn(tmp_path, capsys):
  write(
    tmp_path,
    [
      train(10),
      evaluation(10, 0.6),
      evaluation(10, 0.7, "evaluation_raw"),
      train(20, loss=1.0, accuracy=0.75),
      evaluation(20, 0.9),
      evaluation(20, 0.5, "evaluation_raw"),
      train(30, loss=None),
      evaluation(30, 0.8),
      evaluation(30, 0.4, "evaluation_raw"),
    ],
  )
  lines = drawn(tmp_path)
  training = [(p, x) for p, x in lines if not x.startswith("validation")]
  assert len(training) == len(VALUES)
  for place, name in zip(
    training,
    ("loss", "accuracy", "learning_rate", "grad_norm", "images_per_second",
     "mfu", "data_wait"),
    strict=True,
  ):  # fmt: skip
    steps, values = lines[place]
    expected = [DRAWN[name]] * 3
    if name == "loss":
      expected[1:] = [1.0, np.nan]
    if name == "accuracy":
      expected[1] = 75.0
    np.testing.assert_array_equal(steps, [10, 20, 30])
    np.testing.assert_allclose(values, expected)
  average = lines["Accuracy, top-1", "validation, moving average"]
  np.testing.assert_allclose(average, [[10, 20, 30], [60, 90, 80]])
  raw = lines["Accuracy, top-1", "validation, raw weights"]
  np.testing.assert_allclose(raw, [[10, 20, 30], [70, 50, 40]])

  page, picture = report(tmp_path, capsys)
  assert picture.width == 1400
  assert picture.height > 1500
  assert "Step 30, epoch 3.00, of 40 steps, 4 epochs." in page.text
  assert page.rows[:9] == [
    ["evaluation", "best", "last"],
    ["step", "20", "30"],
    ["epoch", "2", "3"],
    ["weights", *["moving average", "raw"] * 2],
    ["top-1", "90.00%", "50.00%", "80.00%", "40.00%"],
    ["top-5", *["90.00%"] * 4],
    ["loss", *["1.5000"] * 4],
    ["ECE", *["1.23%"] * 4],
    ["images", *["297"] * 4],
  ]
  assert page.facts == [["Best top-1", "90.00%", "epoch 2, step 20"]]
  for row in (
    ["devices", "8 \u00d7 TPU v5e"],
    ["commit", "0123abc"],
    ["versions.jax", "0.10.2"],
    ["config.model.name", "tiny"],
  ):
    assert row in page.rows


def test_where_the_time_went(tmp_path, capsys):
  write(tmp_path, [train(10)])
  seconds = {"steps": 60.0, "start": 20.0, "save": 0.0}
  record = {"kind": "time", "started": 1e9, "resumed": 0, "step": 10}
  save = {"kind": "save", "step": 10, "bytes": 2_000_000}
  lines = [
    {**record, "until": 1e9 + 80, "seconds": seconds},
    {**record, "until": 1e9 + 180, "started": 1e9 + 100, "seconds": seconds},
    {**save, "blocked": 0.5, "durable": 4.0},
    {**save, "blocked": 0.7, "durable": 6.0},
  ]
  text = "".join(json.dumps(line) + "\n" for line in lines)
  (tmp_path / "goodput.jsonl").write_text(text + "{}\n")
  page, _ = report(tmp_path, capsys)
  assert "Goodput: 33.3% of 3.0 min, in 2 starts." in page.text
  # The second process began anew: the steps of the first are lost.
  names = ("productive steps", "start and end", "lost work", "down time")
  assert all(
    row[0].startswith(name) for name, row in zip(names, page.rows, strict=False)
  )
  assert [row[1:] for row in page.rows[:4]] == [
    ["1.0 min", "33.3%"],
    ["40 s", "22.2%"],
    ["1.0 min", "33.3%"],
    ["20 s", "11.1%"],
  ]
  assert page.facts == [
    ["Started", "2001-09-09", "01:46 UTC"],
    ["Duration", "3.0 min", "in 2 starts"],
    ["Time per step", "6 s", "computing and waiting for input"],
    ["Time per epoch", "1.0 min", "10 steps"],
  ]
  assert "Saves: 2 of 2 MB. On average a save blocks training" in page.text
  assert "for 0.6 s and is on disk after 5 s." in page.text
  assert "1 lines of goodput.jsonl are damaged and left out." in page.text


def page_of(workdir):
  assert main([str(workdir)]) == 0
  return Page((workdir / "report.html").read_text())


def test_predictions_are_shown(tmp_path, capsys):
  write(tmp_path, [train(10), evaluation(10, 0.6)])
  title = 'After step 10, <b>"&'
  info = PngInfo()
  info.add_itxt("Title", title)
  path = tmp_path / "examples.png"
  Image.new("RGB", (30, 20)).save(path, pnginfo=info)
  page = page_of(tmp_path)
  encoded = base64.b64encode(path.read_bytes()).decode()
  assert page.sources == [f"data:image/png;base64,{encoded}"]
  assert page.alternatives == ["Examples with their labels and predictions"]
  assert title in page.text
  assert "b" not in page.tags
  assert "left out" not in page.text


def test_a_damaged_picture_of_predictions_is_left_out(tmp_path, capsys):
  write(tmp_path, [train(10)])
  (tmp_path / "examples.png").write_bytes(b"GIF89a")
  page = page_of(tmp_path)
  assert not page.sources
  assert "examples.png is damaged, and is left out." in page.text
  assert "figure" not in page.tags


def test_a_run_of_a_version_before_tasks(tmp_path, capsys):
  """Its report is the same, except for `run.json`."""
  old = {**RUN, "config": {"epochs": 4}}
  del old["steps"], old["task"]
  figures, pages = [], []
  for name, run in (("old", old), ("new", RUN)):
    workdir = tmp_path / name
    workdir.mkdir()
    write(workdir, [train(10), evaluation(10, 0.6)], run=run)
    figures.append(drawn(workdir))
    pages.append(report(workdir, capsys)[0])
  assert figures[0].keys() == figures[1].keys()
  assert pages[0].rows[:2] == pages[1].rows[:2]
  for page in pages:
    assert "Step 10, epoch 1.00, of 40 steps, 4 epochs." in page.text
    assert "cannot be read" not in page.text


def test_another_task_draws_its_own_panels_and_columns(tmp_path, capsys):
  task = {
    "kind": "depth",
    "score": "minus_error",
    "panels": [
      {
        "title": "Error",
        "unit": "mm",
        "lines": [["train", "error", "training"], ["evaluation", "error", ""]],
        "scale": 1000.0,
      }
    ],
    "columns": [["error", "error, m", ".3f"]],
  }
  records = [
    {**train(10), "error": 0.5},
    *(
      {"step": step, "kind": "evaluation", "error": x, "minus_error": score}
      for step, x, score in ((10, 0.25, -0.25), (20, None, None), (30, 1, -1))
    ),
  ]
  write(tmp_path, records, run={**RUN, "task": task})
  lines = drawn(tmp_path)
  assert "Accuracy, top-1" not in {panel for panel, _ in lines}
  steps, values = lines["Error", "training"]
  np.testing.assert_array_equal((*steps, *values), (10, 500.0))
  page, _ = report(tmp_path, capsys)
  assert page.rows[:5] == [
    ["evaluation", "best", "last"],
    ["step", "10", "30"],
    ["epoch", "1", "3"],
    ["weights", *["moving average"] * 2],
    ["error, m", "0.250", "1.000"],
  ]


def test_lines_of_one_kind_differ_by_dashes(tmp_path):
  lines = [
    [kind, value, f"{kind} {value}"]
    for kind in ("evaluation", "evaluation_raw")
    for value in ("ap", "ap50", "ap75", "apl")
  ]
  panel = {"title": "Precision", "unit": "%", "lines": lines, "scale": 100.0}
  task = {**RUN["task"], "panels": [panel], "score": "ap", "columns": []}
  records = [
    {"step": 10, "kind": kind, **{x: 0.5 for _, x, _ in lines if x != "ap50"}}
    for kind in ("evaluation", "evaluation_raw")
  ]
  write(tmp_path, records, run={**RUN, "task": task})
  (axes,) = draw(read_run(tmp_path)).axes[:1]
  assert axes.get_ylabel() == "%"
  looks = {
    line.get_label(): (line.get_color(), line.get_linestyle())
    for line in axes.get_lines()
  }
  assert len(set(looks.values())) == len(looks) == 6
  assert len({color for color, _ in looks.values()}) == 2
  dashes = {name: dash for name, (_, dash) in looks.items()}
  assert dashes["evaluation ap75"] == dashes["evaluation_raw ap75"] == ":"


def page_html(workdir):
  assert main([str(workdir)]) == 0
  return (workdir / "report.html").read_text()


def ticks(workdir):
  axes = draw(read_run(workdir)).axes[-1]
  labels = [x.get_text() for x in axes.get_xticklabels()]
  return axes.get_xlabel(), axes.get_xticks().tolist(), labels


def test_ticks_are_at_whole_epochs(tmp_path):
  run = {**RUN, "epoch_steps": 37.5}
  write(tmp_path, [train(20), train(74)], run=run)
  # A run of less than two epochs has steps.
  assert ticks(tmp_path)[0] == "step"
  write(tmp_path, [train(20), train(225)], run=run)
  label, steps, epochs = ticks(tmp_path)
  assert label == "epoch of 37.5 steps"
  assert epochs == list("0123456")
  assert steps == [37.5 * epoch for epoch in range(7)]
  assert ">epoch</p>" in page_html(tmp_path)
  write(tmp_path, [train(20), train(300_000)], run={})
  assert ticks(tmp_path)[2] == ["0", *(f"{n}k" for n in range(50, 301, 50))]


def test_the_best_checkpoint_is_marked(tmp_path, capsys):
  write(tmp_path, [train(10), evaluation(10, 0.6), evaluation(20, 0.5)])
  for axes in draw(read_run(tmp_path)).axes:
    (marks,) = axes.collections
    assert marks.get_segments()[0][:, 0].tolist() == [10, 10]
  page, _ = report(tmp_path, capsys)
  assert "best checkpoint" in draw(read_run(tmp_path)).axes[-1].get_xlabel()
  assert 'class=best d="M500 0' in page_html(tmp_path)
  assert page.rows[0] == ["evaluation", "best", "last"]


def test_fields_without_a_value_are_left_out(tmp_path, capsys):
  config = {"init_from": "", "seed": 0, "bias": False, "x": None, "y": [{}]}
  records = [evaluation(10, 0.6), evaluation(20, 0.7), evaluation(30, 0.5)]
  for record in records:
    del record["ece"]
  del records[-1]["loss"]
  records[-1]["top5"] = None
  write(tmp_path, records, run={**RUN, "config": config, "commit": ""})
  page, _ = report(tmp_path, capsys)
  names = [row[0] for row in page.rows]
  assert {"config.seed", "config.bias", "config.y"} <= set(names)
  assert not {"config.init_from", "config.x", "commit", "ECE"} & set(names)
  assert ["loss", "1.5000", "\u2013"] in page.rows
  assert ["top-5", "90.00%", "NaN"] in page.rows


def test_a_long_curve_keeps_its_extremes(tmp_path):
  records = [train(step, loss=1.0) for step in range(1, 5001)]
  records[1234]["loss"], records[4321]["loss"] = 9.0, None
  write(tmp_path, records)
  text = page_html(tmp_path)
  assert len(text) < 200_000
  line = re.search('<path class="train d0" d="(M[^"]{99,})"', text)[1]
  heights = [float(x) for x in re.findall(r" (\d+\.?\d*)", line)]
  # The highest value is at the top of the chart.
  assert min(heights) < 60
  assert line.count("M") == 2  # A gap.


def test_a_task_states_the_unit_of_its_loss(tmp_path):
  def units(panels):
    run = {**RUN, "task": {**RUN["task"], "panels": panels}}
    write(tmp_path, [train(10), train(20)], run=run)
    found = draw(read_run(tmp_path)).axes
    assert found[0].get_title(loc="left") == "Loss"
    return [x.get_ylabel() for x in found if x.get_title(loc="left") == "Loss"]

  assert units(RUN["task"]["panels"]) == ["nats"]
  assert units([]) == [""]


def test_a_line_that_hardly_changes_is_not_at_the_edge(tmp_path):
  write(tmp_path, [train(10), train(20, images_per_second=400.1)])
  (axes,) = (
    x
    for x in draw(read_run(tmp_path)).axes
    if x.get_title(loc="left") == "Throughput"
  )
  bottom, top = axes.get_ylim()
  assert bottom == 0
  assert top > 410


@pytest.mark.parametrize(
  "task",
  [
    7,
    [],
    {},
    {**RUN["task"], "panels": [{"title": "x"}]},
    {**RUN["task"], "panels": [{**PANELS[0]._asdict(), "lines": [["x"]]}]},
    {**RUN["task"], "panels": [{**PANELS[0]._asdict(), "unit": {}}]},
    {**RUN["task"], "panels": [{**PANELS[0]._asdict(), "scale": "x"}]},
    {**RUN["task"], "columns": [["x", "y", "%q"]]},
    {**RUN["task"], "columns": [["x", 3, ".2%"]]},
    {**RUN["task"], "columns": [[[], "y", ".2%"]]},
  ],
)
def test_an_invalid_task_is_named(tmp_path, capsys, task):
  write(tmp_path, [train(10), evaluation(10, 0.5)], run={**RUN, "task": task})
  page, _ = report(tmp_path, capsys)
  assert "run.json cannot be read" in page.text


def test_one_window_of_an_older_log_without_evaluation(tmp_path, capsys):
  record = train(5)
  del record["data_wait"], record["mfu"]
  write(tmp_path, [record], run=None)
  page, picture = report(tmp_path, capsys)
  titles = [x.get_title(loc="left") for x in draw(read_run(tmp_path)).axes]
  assert titles[-1] == "Throughput"
  assert len(titles) == 5
  assert picture.height > 1000
  assert "Step 5." in page.text
  assert "Not evaluated yet." in page.text
  assert "run.json cannot be read" in page.text


def test_one_evaluation_and_equal_evaluations(tmp_path, capsys):
  """Of two equal evaluations the later is the best, as among checkpoints."""
  write(tmp_path, [evaluation(10, 0.5), evaluation(20, 0.5)])
  page, _ = report(tmp_path, capsys)
  assert page.rows[:2] == [["evaluation", "best and last"], ["step", "20"]]


HUGE = "1" + 400 * "0"


@pytest.mark.parametrize("description", ["{", "[" * 100_000])
def test_damaged_files_are_left_out_and_named(tmp_path, capsys, description):
  write(tmp_path, [train(1), train(2), train(40)])
  path = tmp_path / "metrics.jsonl"
  text = path.read_text() + '"a string"\n[1\n'
  text += f'{{"step": {HUGE}, "kind": "train", "loss": 1}}\n{{"step": 4, "ki'
  path.write_text(text)
  (tmp_path / "run.json").write_text(description)
  page, _ = report(tmp_path, capsys)
  assert "3 lines of metrics.jsonl are damaged" in page.text
  assert "run.json cannot be read" in page.text
  assert "The last line of metrics.jsonl is incomplete" in page.text
  steps, _ = drawn(tmp_path)["Throughput", ""]
  np.testing.assert_array_equal(steps, [1, 2, 40])


@pytest.mark.parametrize(
  "description",
  [
    f'{{"epoch_steps": {HUGE}}}',
    '{"epoch_steps": 5e-324, "config": {"epochs": 1e308}}',
  ],
)
def test_values_beyond_a_float_are_not_drawn(tmp_path, capsys, description):
  write(tmp_path, [train(1), train(2)])
  path = tmp_path / "metrics.jsonl"
  path.write_text(
    path.read_text() + f'{{"step": 3, "kind": "evaluation", "top1": {HUGE}}}\n'
  )
  (tmp_path / "run.json").write_text(description)
  report(tmp_path, capsys)
  assert (tmp_path / "report.png").is_file()


@pytest.mark.parametrize(
  ("content", "message"),
  [
    (None, "metrics.jsonl does not exist"),
    ("", "metrics.jsonl holds no records yet"),
    ('{"step": 1', "metrics.jsonl holds no records yet"),
  ],
)
def test_nothing_to_draw_is_one_line(tmp_path, capsys, content, message):
  if content is not None:
    (tmp_path / "metrics.jsonl").write_text(content)
  assert main([str(tmp_path)]) == 2
  out, err = capsys.readouterr()
  assert not out
  (line,) = err.splitlines()
  assert line.startswith("report: ")
  assert message in line
  assert not (tmp_path / "report.html").exists()


def test_text_is_escaped(tmp_path, capsys):
  evil = "<script>alert('&\"')</script>"
  # The directory's name is neither a formula nor in the font.
  workdir = tmp_path / "<b>$x_$ \u6570"
  workdir.mkdir()
  write(
    workdir,
    [train(10), evaluation(10, 0.5)],
    run={**RUN, "config": {evil: {evil: evil}}, "commit": evil},
  )
  assert main([str(workdir)]) == 0
  capsys.readouterr()
  page = Page((workdir / "report.html").read_text())
  assert not {"script", "b"} & set(page.tags)
  assert ["commit", evil] in page.rows
  assert [f"config.{evil}.{evil}", evil] in page.rows
  assert workdir.name in page.text


def test_paths_may_be_relative_or_of_the_home_directory(
  tmp_path, monkeypatch, capsys
):
  monkeypatch.setenv("HOME", str(tmp_path))
  (tmp_path / "run").mkdir()
  write(tmp_path / "run", [train(1), train(2)])
  assert main(["~/run"]) == 0
  assert (tmp_path / "run" / "report.png").is_file()
  assert main(["gs://bucket/run"]) == 2
  assert "must be a directory of this machine" in capsys.readouterr().err
