"""Directories of the Hugging Face hub, from a server of the test's own."""

import hashlib
import http.server
import json
import os
import pathlib
import subprocess
import sys
import threading

import pytest

import spatial_mamba_jax as smj
from spatial_mamba_jax.convert import hub

REPOSITORY = "someone/spatial-mamba-small"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = ("config.json", "preprocessor_config.json", "model.safetensors")

PROGRAM = f"""
import sys, spatial_mamba_jax as smj
try:
  model = smj.from_pretrained("{REPOSITORY}", revision="v1")
  print("loaded", smj.summary(model).total.parameters)
except (OSError, ValueError) as error:
  print(type(error).__name__, error)
"""


def git_digest(content):
  return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Hub(http.server.BaseHTTPRequestHandler):
  """Answers as the hub does; `requests` has the paths asked for."""

  def do_GET(self):
    self.server.requests.append(self.path)
    files = self.server.files
    path = self.path.split("?")[0]
    name = path.rpartition("/")[2]
    if path == f"/api/models/{REPOSITORY}/revision/v1":
      siblings = [{"rfilename": name} for name in files]
      self._send(
        json.dumps(
          {"id": REPOSITORY, "sha": COMMIT, "siblings": siblings}
        ).encode()
      )
    elif path == f"/api/models/{REPOSITORY}/tree/{COMMIT}":
      rows = [
        {"type": "file", "path": name, "size": len(x), "oid": git_digest(x)}
        for name, x in files.items()
      ]
      self._send(json.dumps(rows).encode())
    elif path.startswith(f"/{REPOSITORY}/resolve/") and name in files:
      content = files[name]
      digest = git_digest(content)
      if name.endswith(".safetensors"):
        digest = hashlib.sha256(content).hexdigest()
      self._send(content, digest)
    else:
      self.send_error(404)

  do_HEAD = do_GET

  def _send(self, content, digest=None):
    self.send_response(200)
    self.send_header("Content-Length", str(len(content)))
    self.send_header("X-Repo-Commit", COMMIT)
    if digest is not None:
      self.send_header("ETag", f'"{digest}"')
      self.send_header("X-Linked-Etag", f'"{digest}"')
      self.send_header("X-Linked-Size", str(len(content)))
    self.end_headers()
    if self.command == "GET":
      self.wfile.write(content)

  def log_message(self, *_):
    pass


@pytest.fixture
def server(small, tmp_path):
  smj.save_pretrained(small, tmp_path / "x")
  with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
    server.requests = []
    server.files = {
      path.name: path.read_bytes() for path in (tmp_path / "x").iterdir()
    }
    # A pickle, which may run anything.
    server.files["pytorch_model.bin"] = b"\x80\x04"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()


def load(cache, address, **environment):
  done = subprocess.run(
    (sys.executable, "-W", "ignore", "-c", PROGRAM),
    env={
      **os.environ,
      "HF_HOME": str(cache),
      "HF_ENDPOINT": address,
      "HF_HUB_DISABLE_PROGRESS_BARS": "1",
      "HF_HUB_DISABLE_XET": "1",
      **environment,
    },
    capture_output=True,
    text=True,
    check=True,
    timeout=300,
  )
  return done.stdout.splitlines()[-1]


def test_a_repository_is_fetched_once_and_checked(small, server, tmp_path):
  address = f"http://127.0.0.1:{server.server_port}"
  cache = tmp_path / "cache"
  loaded = f"loaded {smj.summary(small).total.parameters}"
  assert load(cache, address) == loaded
  fetched = {path.rpartition("/")[2] for path in server.requests}
  assert set(FILES) <= fetched
  assert not {"pytorch_model.bin", "README.md"} & fetched
  # Without a network, from the cache.
  nowhere = "http://127.0.0.1:9"
  assert load(cache, nowhere) == loaded
  assert load(cache, nowhere, HF_HUB_OFFLINE="1") == loaded
  message = load(tmp_path / "empty", nowhere)
  assert message.startswith(f"FileNotFoundError {REPOSITORY} is no directory")
  assert "copy the directory from a machine where `hf download" in message
  (file,) = cache.rglob("model.safetensors")
  blob = file.resolve()
  content = bytearray(blob.read_bytes())
  content[-1] ^= 1
  blob.write_bytes(content)
  message = load(cache, nowhere)
  assert message.startswith("ValueError")
  assert f"is damaged, its digest differs from the hub's: remove {blob}" in (
    message
  )


def test_digests(tmp_path):
  content = b"some bytes"
  for digest in (hashlib.sha256(content).hexdigest(), git_digest(content)):
    path = tmp_path / digest
    path.write_bytes(content)
    hub.check_digest(path)
    path.write_bytes(content + b"!")
    with pytest.raises(ValueError, match="is damaged"):
      hub.check_digest(path)
  path = tmp_path / "a_copy"
  path.write_bytes(content)
  hub.check_digest(path)


def test_what_is_no_repository_is_a_directory(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  pathlib.Path("a/b").mkdir(parents=True)
  assert hub.directory_of("a/b") == tmp_path / "a" / "b"
  with pytest.raises(ValueError, match="is not on the hub and has no revision"):
    hub.directory_of("a/b", "main")
  for path in ("../b", "a/b/c", "nothing", "/a/b"):
    with pytest.raises(FileNotFoundError, match="is not a directory"):
      hub.directory_of(path)
