"""A second task goes through the same loop, evaluation and report."""

import dataclasses
import json
import signal

import numpy as np
import pytest
from flax import nnx

from spatial_mamba_jax.data import DataConfig, evaluation_batches
from spatial_mamba_jax.data.sources import LABEL_MAPS
from spatial_mamba_jax.errors import UserError
from spatial_mamba_jax.models.pure import PureModel
from spatial_mamba_jax.report import main as report
from spatial_mamba_jax.report import read_run
from spatial_mamba_jax.tasks.base import Evaluation
from spatial_mamba_jax.tasks.classification import ClassificationConfig
from spatial_mamba_jax.training.checkpoint_files import CheckpointFiles
from spatial_mamba_jax.training.config import ModelSection
from spatial_mamba_jax.training.state import empty_window
from tests.pixel_task import PixelExamples, Stripes

CONFIG = """
from tests.pixel_task import get_config
"""


OTHER_SOURCE = """
from tests.pixel_task import Stripes

Stripes.__len__ = lambda self: self.images + 1
"""


@pytest.fixture
def pixels(experiment):
  """Runs of the task that classifies pixels."""
  experiment.path.write_text(CONFIG)
  return experiment


@pytest.mark.soak
def test_a_second_task_trains_resumes_and_reports(pixels, tmp_path, capsys):
  """It resumes bit for bit, and keeps the best by its own score."""
  whole, broken = tmp_path / "whole", tmp_path / "broken"
  status, _, err = pixels.run("train.py", f"--workdir={whole}")
  assert status == 0, err
  assert "pixel accuracy 0." in err
  assert "mIoU " in err
  process = pixels.start("train.py", f"--workdir={broken}")
  for line in process.stderr:
    if line.startswith("step 8/14"):
      break
  process.send_signal(signal.SIGKILL)
  process.communicate()
  status, _, err = pixels.run("train.py", f"--workdir={broken}")
  assert status == 0, err
  assert f"resuming {broken} after step " in err
  assert pixels.records(broken) == pixels.records(whole)
  expected, actual = map(pixels.final_arrays, (whole, broken))
  assert actual.keys() == expected.keys()
  for name, array in expected.items():
    np.testing.assert_array_equal(actual[name], array, err_msg=name)

  evaluations = [x for x in pixels.records(whole) if x["kind"] == "evaluation"]
  assert [x["step"] for x in evaluations] == [4, 8, 12, 14]
  scores = {x["step"]: x["miou"] for x in evaluations}
  best = max(scores, key=lambda step: (scores[step], step))
  assert scores[best] > 0.5  # Chance has 0.2.
  files = CheckpointFiles(whole / "checkpoints")
  assert set(files.steps()) == {best, 14}
  assert files.score(best) == scores[best]

  output = tmp_path / "out"
  status, out, err = pixels.run(
    "eval.py", f"--workdir={whole}", "--json", f"--output_dir={output}"
  )
  assert status == 0, err
  found = json.loads(out)
  assert found["step"] == best
  assert found["ema"] == {"miou": scores[best], "unreadable": 0}
  counts = json.loads((output / "ema" / "counts.json").read_text())
  assert np.sum(counts) == 24 * 16 * 16

  last = f"--checkpoint={whole / 'checkpoints' / '14'}"
  status, out, err = pixels.run("eval.py", last)
  assert status == 0, err
  assert out.startswith(f"step 14: ema  mIoU {100 * scores[14]:.2f}%\n")

  # The identity of the data comes from the source, not from config.data.
  pixels.path.write_text(f"{CONFIG}{OTHER_SOURCE}")
  status, _, err = pixels.run("train.py", f"--workdir={whole}")
  assert status == 2
  assert "training_images was 24 and is 25" in err.splitlines()[-1]

  assert report([str(whole)]) == 0
  page = (whole / "report.html").read_text()
  assert "mIoU" in page
  assert "Predictions of the moving average after step 14<" in page
  pictures = [x / "examples.png" for x in (whole, broken)]
  assert pictures[0].read_bytes() == pictures[1].read_bytes()
  assert [x.title for x in read_run(whole).task.panels] == [
    *("Mean IoU", "Pixels")
  ]


def test_numpy_scalars_are_logged():
  evaluation = Evaluation(
    np.float32(0.5), {"iou": np.float32(0.25), "images": np.int64(3)}, ""
  )
  assert json.dumps(evaluation.to_json()) == '{"iou": 0.25, "images": 3}'
  assert type(evaluation.score) is float
  with pytest.raises(ValueError, match="must not be called step"):
    Evaluation(0.5, {"step": 3}, "")


@dataclasses.dataclass(frozen=True)
class Masked(PixelExamples):
  """Examples with a name that the pipeline reserves."""

  def blank(self, *, train):
    example = super().blank(train=train)
    return {"image": example["image"], "mask": example["labels"]}


def test_reserved_names_are_refused():
  source, config = Stripes(16, 24, "train"), DataConfig(image_size=16)
  with pytest.raises(ValueError, match="must not have arrays called mask"):
    evaluation_batches(source, config, batch_size=8, examples=Masked(16))
  with pytest.raises(ValueError, match="names of their own"):
    empty_window(("hits", "loss"))


class WithDropout(nnx.Module):
  def __init__(self, *, rngs):
    self.dropout = nnx.Dropout(0.5, rngs=rngs)


def test_a_network_that_keeps_random_streams_is_refused():
  with pytest.raises(
    ValueError, match=r"dropout\.rngs\.\w+ is neither a param"
  ):
    PureModel(WithDropout)


def test_classification_refuses_other_image_channels():
  model = ModelSection(in_channels=4).build()
  with pytest.raises(UserError, match=r"in_channels must be 3 .* got 4"):
    ClassificationConfig().create(model, DataConfig(), mesa_weight=0.0)


@pytest.mark.parametrize("name", LABEL_MAPS)
def test_classification_refuses_label_maps(name):
  data = DataConfig(name=name)
  with pytest.raises(UserError, match=f"{name} has label maps, but classif"):
    ClassificationConfig().create(ModelSection().build(), data, mesa_weight=0.0)
