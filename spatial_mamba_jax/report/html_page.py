"""The HTML page of a report."""

import base64
import collections
import html
import json
import math
import statistics
from collections.abc import Iterable, Iterator
from typing import Any

from spatial_mamba_jax.report.run_log import RunLog, to_float
from spatial_mamba_jax.training.example_file import ExamplePicture
from spatial_mamba_jax.training.goodput import PARTS, Goodput, duration


def page(run: RunLog, png: bytes) -> str:
  """Returns the report as one HTML page without scripts or links.

  Args:
    run: the log.
    png: the picture of the curves, which the page contains.
  """
  sections = [
    f"<h1>{_escape(run.name)}</h1>",
    *(f"<p class=note>{_escape(note)}</p>" for note in run.notes),
    f"<p>{_escape(_progress(run))}</p>",
    _evaluations(run),
    *_time(run.goodput),
    _image(png, "Curves of the run, by step"),
    *_examples(run.examples),
    "<h2>Description</h2>",
    _table(("", ""), _description_rows(run.description)),
  ]
  return _PAGE.format(title=_escape(run.name), body="\n".join(sections))


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff;
  max-width: 46rem; margin: 0 auto; padding: 1rem; }}
h1 {{ font-size: 1.5rem; overflow-wrap: anywhere; }}
h2 {{ font-size: 1.15rem; margin-top: 2rem; }}
img {{ width: 100%; height: auto; }}
figure {{ margin: 0; }}
figcaption {{ font-size: .875rem; }}
div {{ overflow-x: auto; }}
table {{ border-collapse: collapse; width: 100%; font-size: .875rem;
  font-variant-numeric: tabular-nums; }}
th, td {{ text-align: left; vertical-align: top; padding: .25rem .6rem .25rem 0;
  border-bottom: 1px solid #ddd; overflow-wrap: anywhere; }}
th {{ font-weight: 600; overflow-wrap: normal; }}
.bar {{ display: block; height: 1em; background: #0072B2; }}
.time td:last-child {{ width: 30%; }}
.note {{ border-left: 4px solid #D55E00; padding-left: .75rem; }}
@media print {{
  body {{ max-width: none; padding: 0; font-size: 10pt; }}
  img {{ max-height: 25cm; width: auto; max-width: 100%; }}
  tr, img {{ break-inside: avoid; }}
}}
</style>
</head>
<body>
{body}
</body>
</html>
"""


def _progress(run: RunLog) -> str:
  """Returns a sentence about the last step."""
  step = run.records[-1]["step"]
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


def _evaluations(run: RunLog) -> str:
  """Returns a table of the best and the last evaluation."""
  score = run.task.score
  evaluated = [
    record
    for record in run.of_kind("evaluation")
    if to_float(record.get(score)) is not None
  ]
  if not evaluated:
    return "<p>Not evaluated yet.</p>"
  # The later of two equal scores, by the rule for the best checkpoint.
  best = max(
    evaluated,
    key=lambda x: (
      -math.inf if math.isnan(x[score]) else x[score],
      x["step"],
    ),
  )
  last = evaluated[-1]
  if best["step"] == last["step"]:
    named = [("best and last", last)]
  else:
    named = [("best", best), ("last", last)]
  rows = []
  for name, ema in named:
    raw = [
      ("raw", record)
      for record in run.of_kind("evaluation_raw")
      if record["step"] == ema["step"]
    ]
    for weights, record in (("moving average", ema), *raw):
      step = record["step"]
      rows.append(
        (
          name,
          weights,
          f"{step:,}",
          f"{step / run.epoch_steps:.1f}" if run.epoch_steps else "",
          *(_formatted(record.get(x.value), x.form) for x in run.task.columns),
        )
      )
  header = (
    *("evaluation", "weights", "step", "epoch"),
    *(column.name for column in run.task.columns),
  )
  return _table(header, rows)


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
    share = goodput.share(part)
    bar = f"<span class=bar style='width: {100 * share:.2f}%'></span>"
    cells = (_escape(description), duration(seconds), f"{share:.1%}", bar)
    rows.append("".join(f"<td>{cell}</td>" for cell in cells))
  body = "\n".join(f"<tr>{row}</tr>" for row in rows)
  yield f"<div><table class=time>\n{body}\n</table></div>"
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
  image = _image(examples.png, "Examples with their labels and predictions")
  caption = f"<figcaption>{_escape(examples.title)}</figcaption>"
  yield f"<figure>{image}{caption}</figure>"


def _image(png: bytes, description: str) -> str:
  data = base64.b64encode(png).decode()
  return f'<img alt="{description}" src="data:image/png;base64,{data}">'


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
  return rows + _flatten(rest) + _flatten(config, "config")


def _flatten(tree: Any, prefix: str = "") -> list[tuple[str, str]]:
  if not isinstance(tree, dict):
    return [(prefix, tree if isinstance(tree, str) else json.dumps(tree))]
  rows = []
  for key, value in tree.items():
    rows += _flatten(value, f"{prefix}.{key}" if prefix else str(key))
  return rows


def _table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
  head = "".join(f"<th>{_escape(cell)}</th>" for cell in header)
  body = "\n".join(
    f"<tr>{''.join(f'<td>{_escape(cell)}</td>' for cell in row)}</tr>"
    for row in rows
  )
  return f"<div><table>\n<tr>{head}</tr>\n{body}\n</table></div>"


def _escape(text: str) -> str:
  return html.escape(text.encode(errors="replace").decode())


def _formatted(value: Any, form: str) -> str:
  """Formats a logged value; returns "" where it is not a number."""
  number = to_float(value)
  return "" if number is None else format(number, form)
