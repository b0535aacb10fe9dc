"""A second task, as small as one can be: a class for each pixel."""

import dataclasses
import io
import json
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from spatial_mamba_jax.data import DataConfig
from spatial_mamba_jax.models.layers import linear
from spatial_mamba_jax.tasks.base import (
  Column,
  Evaluation,
  Line,
  Loss,
  Panel,
  TaskConfig,
)
from spatial_mamba_jax.training.config import (
  ModelSection,
  OptimizerConfig,
  TrainConfig,
)

COLOURS = np.array([[200, 40, 40], [40, 200, 40], [40, 40, 200]], np.uint8)


@dataclasses.dataclass
class PixelConfig(TaskConfig):
  """Has no settings."""

  kind: ClassVar[str] = "pixels"

  def create(self, model, data, *, mesa_weight):
    return PixelTask(model, data)


@dataclasses.dataclass(frozen=True)
class Stripes:
  """Images of coloured stripes, with noise; the labels are the colours."""

  size: int
  images: int
  split: str

  def __len__(self):
    return self.images

  def __getitem__(self, index):
    rng = np.random.default_rng([index, self.split == "train"])
    labels = np.repeat(rng.integers(3, size=self.size // 4), 4)
    labels = np.broadcast_to(labels, (self.size, self.size))
    noise = rng.integers(0, 40, (self.size, self.size, 3), np.uint8)
    return {"image": COLOURS[labels] + noise, "labels": labels.astype(np.int32)}

  def name(self, index):
    return f"{self.split}[{index}]"


@dataclasses.dataclass(frozen=True)
class PixelExamples:
  size: int

  def read(self, record):
    return record

  def train(self, decoded, rng):
    step = -1 if rng.random() < 0.5 else 1
    return {k: np.ascontiguousarray(x[:, ::step]) for k, x in decoded.items()}

  def evaluate(self, decoded):
    return decoded

  def blank(self, *, train):
    shape = (self.size, self.size)
    return {
      "image": np.zeros((*shape, 3), np.uint8),
      "labels": np.zeros(shape, np.int32),
    }


class PixelNetwork(nnx.Module):
  """A backbone and one linear layer."""

  def __init__(self, config, *, rngs):
    self.backbone = config.family.backbone(config, out_indices=(0,), rngs=rngs)
    self.classifier = linear(config.dims[0], 3, dtype=jnp.float32, rngs=rngs)

  def __call__(self, images, *, rngs=None):
    (features,) = self.backbone(images, rngs=rngs)
    logits = self.classifier(features)
    return jnp.repeat(jnp.repeat(logits, 4, axis=1), 4, axis=2)


def as_floats(images):
  return images.astype(jnp.float32) / 128 - 1


class PixelMeter:
  """Counts which class is taken for which."""

  def __init__(self):
    self.counts = np.zeros((3, 3), np.int64)

  def add(self, columns):
    self.counts += columns["counts"].sum(0)

  def result(self, unreadable):
    hits, counts = np.diag(self.counts), self.counts
    union = counts.sum(0) + counts.sum(1) - hits
    miou = float(np.mean(hits / np.maximum(union, 1)))
    values = {"miou": miou, "unreadable": unreadable}
    return Evaluation(miou, values, f"mIoU {100 * miou:.2f}%")

  def picture(self, title):
    info, file = PngInfo(), io.BytesIO()
    info.add_itxt("Title", title)
    counts = Image.fromarray(self.counts.astype(np.uint8))
    counts.save(file, "PNG", pnginfo=info)
    return file.getvalue()

  def write(self, directory):
    (directory / "counts.json").write_text(json.dumps(self.counts.tolist()))


class PixelTask:
  sums = ("pixels", "hits")
  score = "miou"
  panels = (
    Panel("Mean IoU", "%", (Line("evaluation", "miou", "average"),), 100.0),
    Panel("Pixels", "%", (Line("train", "pixel_accuracy", ""),), 100.0),
  )
  columns = (Column("miou", "mIoU", ".2%"),)

  def __init__(self, model, data):
    self._model, self._data = model, data

  def network(self, *, rngs):
    return PixelNetwork(self._model, rngs=rngs)

  def source(self, split):
    return Stripes(self._data.image_size, self._data.synthetic_images, split)

  def examples(self):
    return PixelExamples(self._data.image_size)

  def prepare(self, batch, key):
    noise = jax.random.normal(key, batch["image"].shape) / 50
    return as_floats(batch["image"]) + noise, batch["labels"]

  def loss(self, network, batch, key, teacher):
    images, labels = batch
    logits = network(images, rngs=nnx.Rngs(drop_path=key))
    likelihood = jnp.take_along_axis(
      jax.nn.log_softmax(logits), labels[..., None], axis=-1
    )
    value = -jnp.mean(likelihood)
    if teacher is not None:
      value -= jnp.mean(jnp.sum(teacher * jax.nn.log_softmax(logits), -1))
    hits = jnp.argmax(logits, -1) == labels
    return Loss(value, {"pixels": labels.size, "hits": jnp.sum(hits)})

  def teach(self, network, batch):
    return jax.nn.softmax(network(batch[0]))

  def predict(self, network, batch):
    predicted = jnp.argmax(network(as_floats(batch["image"])), -1)
    cells = jax.nn.one_hot(3 * batch["labels"] + predicted, 9)
    counts = jnp.sum(cells, axis=(1, 2)).astype(jnp.int32)
    return {"counts": counts.reshape(-1, 3, 3)}

  def meter(self, source):
    return PixelMeter()

  def logged(self, sums):
    return {"pixel_accuracy": sums["hits"] / sums["pixels"]}


def get_config():
  return TrainConfig(
    task=PixelConfig(),
    model=ModelSection(dims=(8, 8), depths=(2, 1), drop_path_rate=0.1),
    data=DataConfig(image_size=16, synthetic_images=24, num_workers=0),
    optimizer=OptimizerConfig(
      learning_rate=1e-2,
      reference_batch_size=8,
      warmup="3 steps",
      layer_decay=0.9,
    ),
    batch_size=8,
    accumulation_steps=2,
    length="14 steps",
    ema_decay=0.5,
    mesa_weight=1.0,
    mesa_start=0.5,
    evaluation_batch_size=16,
    evaluate_every="4 steps",
    checkpoint_every="3 steps",
    log_every="2 steps",
    keep_last=1,
  )
