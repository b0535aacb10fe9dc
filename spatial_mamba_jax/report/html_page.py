"""The HTML page of a report."""

import collections
import datetime
import json
import math
import statistics
from collections.abc import Iterable, Iterator
from typing import Any

from spatial_mamba_jax.report.charts import charts
from spatial_mamba_jax.report.markup import escape, png_image
from spatial_mamba_jax.report.run_log import RunLog, to_float
from spatial_mamba_jax.report.style import CSS
from spatial_mamba_jax.training.example_file import ExamplePicture
from spatial_mamba_jax.training.goodput import PARTS, Goodput, duration

# Values of fields that are left out.
_EMPTY = (None, "", [], {})
# Stands for a value that an evaluation lacks and another one has.
_ABSENT = "\N{EN DASH}"


def page(run: RunLog) -> str:
  """Returns the report as one HTML page without scripts or links."""
  sections = [
    f"<h1>{escape(run.name)}</h1>",
    f"<p>{escape(_progress(run))}</p>",
    *(f"<p class=note>{escape(note)}</p>" for note in run.notes),
    _facts(run),
    "<h2>Evaluation</h2>",
    _evaluations(run),
    "<h2>Curves</h2>",
    charts(run),
    *_examples(run.examples),
    *_time(run.goodput),
    *_description(run.description),
  ]
  head = _HEAD.format(title=escape(run.name), css=CSS)
  return "\n".join((head, *sections, "</body>\n</html>\n"))


_HEAD = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>{css}</style>
</head>
<body>"""


def _progress(run: RunLog) -> str:
  """Returns a sentence about the last step."""
  step = run.last_step
  steps = to_float(run.description.get("steps"))
  if not run.epoch_steps:
    return f"Step {step:,}."
  config = run.description.get("config")
  if steps is None and isinstance(config, dict):  # Version 1.
    epochs = to_float(config.get("epochs"))
    steps = None if epochs is None else epochs * run.epoch_steps
  line = f"Step {step:,}, epoch {step / run.epoch_steps:.2f}"
  if steps is None:
    return f"{line}."
  if step >= steps:
    return f"{line}: complete."
  return f"{line}, of {steps:,.0f} steps, {steps / run.epoch_steps:.6g} epochs."


def _facts(run: RunLog) -> str:
  """Returns the best score, and when and how fast the run was."""
  facts = []
  for column in run.task.columns:
    if run.best and column.value == run.task.score:
      score = _formatted(run.best[column.value], column.form)
      facts.append((f"Best {column.name}", score, _position(run, run.best)))
  if run.goodput:
    facts += _times(run, run.goodput)
  cards = "\n".join(
    f"<div><dt>{escape(name)}</dt><dd class=value>{escape(value)}"
    f"<small>{escape(detail)}</small></dd></div>"
    for name, value, detail in facts
  )
  return f"<dl class=facts>\n{cards}\n</dl>" if cards else ""


def _times(run: RunLog, goodput: Goodput) -> Iterator[tuple[str, str, str]]:
  try:
    start = datetime.datetime.fromtimestamp(goodput.started, datetime.UTC)
    yield "Started", f"{start:%Y-%m-%d}", f"{start:%H:%M} UTC"
  except (OverflowError, ValueError):
    pass  # A damaged file may have a year that no calendar has.
  starts = f"in {goodput.starts:,} start{'s' * (goodput.starts > 1)}"
  yield "Duration", duration(goodput.wall), starts
  if run.last_step <= 0:
    return
  computing = goodput.seconds["steps"] + goodput.seconds["input"]
  seconds = computing / run.last_step
  yield "Time per step", duration(seconds), "computing and waiting for input"
  if run.epoch_steps:
    seconds *= run.epoch_steps
    yield "Time per epoch", duration(seconds), f"{run.epoch_steps:,.6g} steps"


def _position(run: RunLog, record: dict[str, Any]) -> str:
  step = record["step"]
  if not run.epoch_steps:
    return f"step {step:,}"
  return f"epoch {step / run.epoch_steps:.4g}, step {step:,}"


def _evaluations(run: RunLog) -> str:
  """Returns a table of the best and the last evaluation, side by side."""
  best = run.best
  if best is None:
    return "<p>Not evaluated yet.</p>"
  last = run.evaluations[-1]
  if best["step"] == last["step"]:
    named = [("best and last", last)]
  else:
    named = [("best", best), ("last", last)]
  groups, columns = [], []
  for name, ema in named:
    raw = [
      ("raw", record)
      for record in run.of_kind("evaluation_raw")
      if record["step"] == ema["step"]
    ]
    mark = " best" if ema is best else ""
    members = [("moving average", ema), *raw]
    groups.append((name, ema["step"], len(members), mark))
    columns += [(weights, record, mark) for weights, record in members]
  rows = [_group_row("evaluation", [(x[0], *x[2:]) for x in groups])]
  rows.append(_group_row("step", [(f"{x[1]:,}", *x[2:]) for x in groups]))
  if steps := run.epoch_steps:
    epochs = [(f"{x[1] / steps:.4g}", *x[2:]) for x in groups]
    rows.append(_group_row("epoch", epochs))
  rows.append(_group_row("weights", [(x[0], 1, x[2]) for x in columns]))
  for column in run.task.columns:
    cells = [_formatted(x[1].get(column.value), column.form) for x in columns]
    if any(cells):
      rows.append(
        f"<tr{' class=score' * (column.value == run.task.score)}>"
        f"<th scope=row>{escape(column.name)}</th>"
        + "".join(
          f'<td class="number{mark}">{escape(cell or _ABSENT)}</td>'
          for cell, (_, _, mark) in zip(cells, columns, strict=True)
        )
        + "</tr>"
      )
  return _table("scores", rows)


def _table(name: str, rows: Iterable[str]) -> str:
  """Returns a table; `name` is its class in the style sheet."""
  body = "\n".join(rows)
  return f'<div class="card {name}"><table>\n{body}\n</table></div>'


def _group_row(name: str, cells: Iterable[tuple[str, int, str]]) -> str:
  """Returns a row of headings, each (text, columns that it spans, classes)."""
  row = "".join(
    f'<th class="number{mark}" colspan={span}>{escape(text)}</th>'
    for text, span, mark in cells
  )
  return f"<tr><th scope=row>{escape(name)}</th>{row}</tr>"


def _time(goodput: Goodput | None) -> Iterator[str]:
  """Yields a table of where the time went, and a sentence about the saves."""
  if goodput is None:
    return
  yield "<h2>Time</h2>"
  line = f"Goodput: {goodput.share('steps'):.1%} of {duration(goodput.wall)}"
  if (starts := goodput.starts) > 1:
    line += f", in {starts:,} starts"
  yield f"<p>{line}.</p>"
  rows = []
  for part, description in PARTS.items():
    if not (seconds := goodput.seconds[part]):
      continue
    name, _, detail = description.partition(": ")
    small = f"<small>{escape(detail)}</small>" if detail else ""
    share = goodput.share(part)
    bar = f'<span class=bar style="--share: {share:.4f}"></span>'
    rows.append(
      f"<tr><th scope=row>{escape(name)}{small}</th>"
      f"<td class=number>{duration(seconds)}</td>"
      f"<td class=share><span class=number>{share:.1%}</span>{bar}</td></tr>"
    )
  yield _table("times", rows)
  for is_local in (False, True):
    saves = [save for save in goodput.saves if save.is_local == is_local]
    if not saves:
      continue
    where = " on the hosts' disks" if is_local else ""
    blocked = statistics.fmean(save.blocked for save in saves)
    durable = statistics.fmean(save.durable for save in saves)
    yield (
      f"<p>Saves{where}: {len(saves):,} of {saves[-1].bytes / 1e6:,.3g} MB."
      f" On average a save blocks training for {duration(blocked)} and is on"
      f" disk after {duration(durable)}.</p>"
    )


def _examples(examples: ExamplePicture | None) -> Iterator[str]:
  """Yields a picture of predictions, with its title as the caption."""
  if examples is None:
    return
  yield "<h2>Predictions</h2>"
  image = png_image(examples.png, "Examples with their labels and predictions")
  caption = f"<figcaption>{escape(examples.title)}</figcaption>"
  yield f"<figure class=card>{image}{caption}</figure>"


def _description(description: dict[str, Any]) -> Iterator[str]:
  """Yields a table of `run.json`."""
  rows = _description_rows(description)
  if not rows:
    return
  yield "<h2>Description</h2>"
  yield "<p class=quiet>Fields without a value are not shown.</p>"
  yield _table(
    "fields",
    (
      f"<tr><th scope=row>{escape(name)}</th><td>{escape(text)}</td></tr>"
      for name, text in rows
    ),
  )


def _description_rows(description: dict[str, Any]) -> list[tuple[str, str]]:
  rest = {k: x for k, x in description.items() if k != "task"}
  rows = []
  devices = rest.pop("devices", None)
  if isinstance(devices, list):
    kinds = collections.Counter(map(str, devices))
    text = ", ".join(f"{count} \u00d7 {kind}" for kind, count in kinds.items())
    rows.append(("devices", text))
  # The config is the longest part and comes last.
  config = rest.pop("config", {})
  rows += _flatten(rest) + _flatten(config, "config")
  return [row for row in rows if row[1]]


def _flatten(tree: Any, prefix: str = "") -> list[tuple[str, str]]:
  if tree in _EMPTY:
    return []
  if not isinstance(tree, dict):
    return [(prefix, tree if isinstance(tree, str) else json.dumps(tree))]
  rows = []
  for key, value in tree.items():
    rows += _flatten(value, f"{prefix}.{key}" if prefix else str(key))
  return rows


def _formatted(value: Any, form: str) -> str:
  """Formats a logged value; returns "" where it is not a number."""
  number = to_float(value)
  if number is None:
    return ""
  return "NaN" if math.isnan(number) else format(number, form)
