"""A report in a real browser: on a phone, on a desktop, in the dark."""

import io
import itertools
import json

import numpy as np
import pytest
from PIL import Image

from spatial_mamba_jax.report import main
from spatial_mamba_jax.tasks.classification.panels import COLUMNS, PANELS
from tests.browser import browser

pytestmark = pytest.mark.browser

EVIL = "</td></style><script>window.evil = 1</script><img src=http://x.test/>"
RUN = {
  "config": {
    "init_from": "",
    "learning_rate": 0.000512345678901,
    "dims": [64, 128, 256, 512],
    "directory": "/a/path/" + "of_many_letters" * 9,
    EVIL: {EVIL: f'"{EVIL}'},
  },
  "epoch_steps": 40,
  "steps": 240,
  "task": {
    "kind": "classification",
    "score": "top1",
    "panels": [panel._asdict() for panel in PANELS],
    "columns": COLUMNS,
  },
  "commit": "0123abc",
}
SECONDS = {"steps": 60.0, "start": 20.0, "compile": 5000.0, "input": 1.0}
PHONE, DESKTOP = 390, 1280
TRAIN_COLOURS = {False: (0, 114, 178), True: (86, 180, 233)}

# Texts, each with the number of its lines on the screen.
LINES = """
[...document.querySelectorAll("SELECTOR")].map(element => {
  const range = document.createRange();
  range.selectNodeContents(element.firstChild);
  const tops = [...range.getClientRects()].map(x => Math.round(x.top));
  return [element.firstChild.textContent, new Set(tops).size];
})"""
NUMBERS = "td.number, .share .number, .value, .plot span, .fields td"
# Contrasts of text with what is behind it, each with the text.
CONTRASTS = """
(() => {
  const luminance = colour => {
    const [r, g, b] = colour.match(/[\\d.]+/g).map(Number).map(x => x / 255)
      .map(x => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = element => {
    const colour = getComputedStyle(element).backgroundColor;
    const isClear = colour === "rgba(0, 0, 0, 0)" && element.parentElement;
    return isClear ? behind(element.parentElement) : colour;
  };
  const contrast = (element, colour) => {
    const pair = [luminance(colour), luminance(behind(element))];
    return (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05);
  };
  const texts = [...document.body.querySelectorAll("*")].filter(element =>
    [...element.childNodes].some(x => x.nodeType === 3 && x.data.trim()));
  const curves = [...document.querySelectorAll(".train, .ema, .raw")];
  return {
    texts: texts.map(x =>
      [contrast(x, getComputedStyle(x).color), x.innerText]),
    curves: curves.map(x => contrast(x, getComputedStyle(x).stroke)),
  };
})()"""
# The boxes of the parts of each chart.
CHARTS = """
[...document.querySelectorAll(".plot")].map(plot => {
  const box = x => {
    const {left, right, top, bottom} = x.getBoundingClientRect();
    return {left, right, top, bottom, text: x.textContent};
  };
  const boxes = name => [...plot.querySelectorAll(name)].map(box);
  return {
    frame: box(plot), best: boxes("path.best"), x: boxes(".x"), y: boxes(".y"),
    grid: boxes("path.grid"), dots: boxes("path.dot"),
  };
})"""


@pytest.fixture(scope="module")
def page(tmp_path_factory):
  """The report of a run of six epochs, whose fifth is the best."""
  workdir = tmp_path_factory.mktemp("run")
  records = []
  for step in range(10, 241, 10):
    values = {"loss": 300 / step, "accuracy": step / 250, "grad_norm": 123456.0}
    speeds = {"learning_rate": 1e-5, "images_per_second": 12345.6}
    records.append({"step": step, "kind": "train", **values, **speeds})
    if step % 40 == 0:
      top1 = 0.9123 if step == 200 else 0.001 * step
      values = {"top1": top1, "top5": 1.0, "loss": 1.2345, "ece": 0.0123}
      for kind in ("evaluation", "evaluation_raw"):
        record = {"step": step, "kind": kind, **values, "images": 50_000}
        records.append(record)
  lines = "".join(json.dumps(record) + "\n" for record in records)
  (workdir / "metrics.jsonl").write_text(lines)
  (workdir / "run.json").write_text(json.dumps(RUN))
  time = {"kind": "time", "started": 1e9, "until": 1e9 + 99_999, "resumed": 0}
  ledger = json.dumps({**time, "step": 240, "seconds": SECONDS})
  (workdir / "goodput.jsonl").write_text(ledger + "\n")
  assert main([str(workdir)]) == 0
  return workdir / "report.html"


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
  with browser(tmp_path_factory.mktemp("browser")) as found:
    yield found


@pytest.mark.parametrize("width", [PHONE, DESKTOP])
@pytest.mark.parametrize("is_dark", [False, True])
def test_the_page_is_legible(tab, page, width, is_dark):
  tab.open(page, width=width, is_dark=is_dark)
  # Nothing runs, is fetched or is refused.
  assert not tab.problems
  assert tab.value("typeof window.evil") == "undefined"
  assert tab.value("document.scripts.length") == 0
  # The page itself never scrolls sideways.
  assert tab.value("document.documentElement.scrollWidth") == width
  lines = tab.value(LINES.replace("SELECTOR", NUMBERS))
  broken = [text for text, count in lines if count != 1 and "/" not in text]
  assert len(lines) > 60
  assert not broken
  found = tab.value(CONTRASTS)
  assert min(found["texts"])[0] >= 4.5, min(found["texts"])
  assert min(found["curves"]) >= 3
  pixels = np.asarray(Image.open(io.BytesIO(tab.screenshot())).convert("RGB"))
  assert pixels.shape[1] == width
  background = pixels.mean()
  assert background < 60 if is_dark else background > 220
  # Texts and curves are drawn.
  assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50
  assert (pixels == TRAIN_COLOURS[is_dark]).all(-1).sum() > 500


@pytest.mark.parametrize("width", [PHONE, DESKTOP])
def test_the_axes_fit_the_curves(tab, page, width):
  tab.open(page, width=width)
  found = tab.value(CHARTS)
  assert len(found) == 5
  for chart in found:
    frame, (best,) = chart["frame"], chart["best"]
    ticks = {x["text"]: (x["left"] + x["right"]) / 2 for x in chart["x"]}
    assert list(ticks) == list("0123456")
    assert best["left"] == pytest.approx(ticks["5"], abs=1)
    assert ticks["0"] == pytest.approx(frame["left"], abs=1)
    assert ticks["6"] == pytest.approx(frame["right"], abs=1)
    # The labels beside the grid's outermost lines.
    heights = sorted((y["top"] + y["bottom"]) / 2 for y in chart["y"])
    (grid,) = chart["grid"]
    limits = grid["top"], grid["bottom"]
    assert limits == pytest.approx((heights[0], heights[-1]), abs=1)
    for dots in chart["dots"]:
      assert frame["top"] <= dots["top"] <= dots["bottom"] <= frame["bottom"]
    for labels, sides in ((chart["x"], "lr"), (chart["y"], "tb")):
      low, high = {"lr": ("left", "right"), "tb": ("top", "bottom")}[sides]
      spans = sorted((x[low], x[high]) for x in labels)
      assert all(a[1] < b[0] for a, b in itertools.pairwise(spans))
    assert min(y["left"] for y in chart["y"]) > 0


def test_scores_of_two_evaluations_fit_a_phone(tab, page):
  tab.open(page, width=PHONE)
  box = "document.querySelector('.scores')"
  assert tab.value(f"{box}.scrollWidth - {box}.clientWidth") == 0
