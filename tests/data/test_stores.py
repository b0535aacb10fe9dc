"""A data set in Google Cloud Storage, served by a server of this machine."""

import contextlib
import http.server
import pathlib
import threading
import urllib.parse

import numpy as np
import pytest

from spatial_mamba_jax.data import (
  DataConfig,
  evaluation_batches,
  open_source,
  stores,
)
from spatial_mamba_jax.data.prepare_imagenet import main
from spatial_mamba_jax.errors import UserError


class Objects(http.server.BaseHTTPRequestHandler):
  """Answers the two requests of readers: an object, and a range of it."""

  protocol_version = "HTTP/1.1"
  root: pathlib.Path

  def log_message(self, format, *args):
    del format, args

  def do_GET(self):
    path = urllib.parse.urlsplit(self.path).path
    bucket, _, name = path.removeprefix("/storage/v1/b/").partition("/o/")
    file = self.root / urllib.parse.unquote(name)
    if bucket == "secret" or not file.is_file():
      self.send_response(403 if bucket == "secret" else 404)
      content = b""
    else:
      content = self.part(file.read_bytes())
    self.send_header("Content-Length", str(len(content)))
    self.end_headers()
    # Readers close the connection once they have enough.
    with contextlib.suppress(ConnectionError):
      self.wfile.write(content)

  def part(self, content: bytes) -> bytes:
    asked = self.headers.get("Range")
    if not asked:
      self.send_response(200)
      return content
    first, last = asked.removeprefix("bytes=").split("-")
    size = len(content)
    start = int(first) if first else max(0, size - int(last))
    end = min(size, int(last) + 1) if first and last else size
    self.send_response(206)
    self.send_header("Content-Range", f"bytes {start}-{end - 1}/{size}")
    return content[start:end]


@pytest.fixture(scope="module")
def data_dir(image_tree, tmp_path_factory) -> pathlib.Path:
  directory = tmp_path_factory.mktemp("tfds")
  assert main([f"--image_folder={image_tree}", f"--data_dir={directory}"]) == 0
  return directory


@pytest.fixture(scope="module", autouse=True)
def server(data_dir):
  Objects.root = data_dir
  server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Objects)
  thread = threading.Thread(target=server.serve_forever)
  thread.start()
  url = f"http://127.0.0.1:{server.server_port}"
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("CLOUD_STORAGE_EMULATOR_ENDPOINT", url)  # array_record's
    patch.setenv("TENSORSTORE_GCS_HTTP_URL", url)
    patch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "token")
    yield
  server.shutdown()
  thread.join()
  server.server_close()


def config_for(data_dir) -> DataConfig:
  return DataConfig(name="imagenet2012", data_dir=str(data_dir), image_size=16)


@pytest.mark.parametrize("split", ["train", "validation"])
def test_the_data_set_is_that_of_the_disk(data_dir, split):
  expected = open_source(config_for(data_dir), split)
  source = open_source(config_for("gs://bucket/"), split)
  assert source.classes == expected.classes
  assert len(source) == len(expected)
  for i in range(len(source)):
    assert source[i] == expected[i]
    assert source.name(i) == expected.name(i)


def test_the_pipeline_reads_it_with_threads(data_dir):
  batches = []
  for directory in (data_dir, "gs://bucket"):
    config = config_for(directory)
    source = open_source(config, "train")
    with evaluation_batches(source, config, batch_size=12) as pipeline:
      batches.append(next(pipeline))
  np.testing.assert_array_equal(batches[0]["image"], batches[1]["image"])
  assert batches[1]["mask"].all()


def refused(directory: str) -> str:
  with pytest.raises(UserError) as caught:
    open_source(config_for(directory), "train")
  assert "\n" not in str(caught.value)
  return str(caught.value)


def test_no_data_set():
  message = refused("gs://bucket/elsewhere")
  assert "is not prepared in gs://bucket/elsewhere: set" in message
  assert "copy its imagenet2012 to gs://bucket/elsewhere" in message


def test_no_access():
  message = refused("gs://secret")
  assert message.startswith(
    "cannot open imagenet2012: gs://secret/imagenet2012"
  )
  assert "403" in message


def test_malformed():
  for url in ("gs://", "gs:///"):
    assert "must be gs://BUCKET/DIRECTORY" in refused(url)


def test_a_missing_shard(data_dir):
  (path,) = data_dir.rglob("*-train.array_record*")
  path.rename(data_dir / "hidden")
  try:
    message = refused("gs://bucket")
  finally:
    (data_dir / "hidden").rename(path)
  assert f"gs://bucket/{path.relative_to(data_dir)} is damaged" in message
  assert "404" in message


def test_reads_the_beginning(data_dir):
  name = "imagenet2012/5.1.0/dataset_info.json"
  expected = (data_dir / name).read_bytes()
  for directory in (str(data_dir), "gs://bucket"):
    path = stores.location(directory, "x") / name
    assert stores.read(path, 10) == expected[:10]
    assert stores.read(path, 10**6) == expected
    assert stores.exists(path)
    assert not stores.exists(path.with_name("none"))


@pytest.mark.parametrize("name", ["digits", "image_folder"])
def test_other_sources_need_a_directory(name):
  config = DataConfig(name=name, data_dir="gs://bucket")
  with pytest.raises(UserError, match="a directory of this machine, got gs"):
    open_source(config, "train")


def test_other_stores_are_refused():
  assert "a directory of this machine, got s3://b" in refused("s3://b")


def test_is_not_written(image_tree, capsys):
  assert main([f"--image_folder={image_tree}", "--data_dir=gs://bucket"]) == 2
  assert "a directory of this machine, got gs" in capsys.readouterr().err
