"""The command that classifies images."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image

import spatial_mamba_jax as smj
from spatial_mamba_jax import classify

NAMES = ("zero", "öne", "two\n", "three")


@pytest.fixture(scope="module")
def model():
  model = smj.create_model(
    "spatial_mamba_micro",
    dims=(8, 16),
    depths=(1, 1),
    num_classes=4,
    class_names=NAMES,
    preprocessing=smj.Preprocessing(image_size=32, short_side=36),
    rngs=nnx.Rngs(0),
  )
  # Fresh heads are almost 0.
  kernel = model.head.kernel
  kernel.set_value(jax.random.normal(jax.random.key(1), kernel.shape))
  return model


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory):
  path = tmp_path_factory.mktemp("checkpoint") / "x"
  smj.save_pretrained(model, path)
  return str(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Ten images of several sizes, more than a batch, and a broken one."""
  root = tmp_path_factory.mktemp("images")
  rng = np.random.default_rng(0)
  for i in range(10):
    size = (40 + 7 * (i % 3), 50)
    pixels = rng.integers(0, 256, (*size, 3), np.uint8)
    Image.fromarray(pixels).save(root / f"{i}.png")
  (root / "3.jpg").write_bytes(b"\xff\xd8\xff")
  return root


def test_predictions_are_the_networks(model, checkpoint, folder, capsys):
  photo = str(folder / "0.png")
  arguments = [f"--checkpoint={checkpoint}", photo, str(folder), "--json"]
  assert classify.main([*arguments, "--top=3"]) == 1
  out, err = capsys.readouterr()
  rows = [json.loads(line) for line in out.splitlines()]
  files = [photo, *sorted(map(str, folder.iterdir()))]
  assert [row["path"] for row in rows] == files
  assert err.count("\n") == 1
  assert "3.jpg cannot be read" in err
  transform = smj.create_transform(model)
  for row in rows:
    if "error" in row:
      assert row["path"].endswith("3.jpg")
      continue
    expected = jax.nn.softmax(model(transform(row["path"]))[0])
    order = np.argsort(-expected)[:3]
    assert [x["label"] for x in row["classes"]] == order.tolist()
    assert [x["name"] for x in row["classes"]] == [NAMES[i] for i in order]
    np.testing.assert_allclose(
      [x["probability"] for x in row["classes"]], expected[order], rtol=1e-5
    )


def test_heat_adds_up_to_the_logit(model, folder):
  images = smj.create_transform(model)([folder / "0.png", folder / "1.png"])
  scores, heat = classify.class_activations(model, images)
  logits = model(images)
  np.testing.assert_allclose(scores, jax.nn.softmax(logits), rtol=1e-5)
  assert heat.shape == (2, 4, 4)
  np.testing.assert_allclose(
    heat.mean((1, 2)), logits.max(-1), rtol=1e-4, atol=1e-6
  )


def test_the_command_prints_lines_and_draws(checkpoint, folder, tmp_path):
  command = (sys.executable, "-m", "spatial_mamba_jax.classify")
  out = tmp_path / "heat.png"
  done = subprocess.run(
    (
      *command,
      f"--checkpoint={checkpoint}",
      *(folder / "0.png", folder / "1.png"),
      *("--top=9", f"--heat={out}"),
    ),
    capture_output=True,
    text=True,
    check=True,
  )
  lines = done.stdout.splitlines()
  assert len(lines) == 2
  assert lines[0].startswith(f"{folder / '0.png'}: ")
  assert all(line.count("%") == 4 for line in lines)
  assert "two," in done.stdout or done.stdout.count("two") == 2
  assert done.stderr == f"wrote {out}\n"
  with Image.open(out) as image:
    assert image.width > 600
    assert np.asarray(image.convert("RGB")).std() > 20


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["nothing.png"], "nothing.png does not exist"),
    (["EMPTY"], "has no images"),
    (["0.png", "--heat=x.gif"], "must end in .png or .svg"),
    (["0.png", "--checkpoint=nowhere"], "nowhere is not a directory"),
  ],
)
def test_mistakes_are_told(
  checkpoint, folder, tmp_path, monkeypatch, capsys, arguments, message
):
  monkeypatch.chdir(folder)
  arguments = [x.replace("EMPTY", str(tmp_path)) for x in arguments]
  assert classify.main([f"--checkpoint={checkpoint}", *arguments]) == 2
  out, err = capsys.readouterr()
  assert not out
  assert err.startswith("classify: ")
  assert message in err
  assert err.count("\n") == 1


def test_a_backbone_does_not_classify(folder, tmp_path, capsys):
  backbone = smj.create_backbone(
    "spatial_mamba_micro",
    dims=(8, 16),
    depths=(1, 1),
    out_indices=(1,),
    rngs=nnx.Rngs(0),
  )
  smj.save_pretrained(backbone, tmp_path / "x")
  arguments = [f"--checkpoint={tmp_path / 'x'}", str(folder / "0.png")]
  assert classify.main(arguments) == 2
  assert "does not classify images" in capsys.readouterr().err
