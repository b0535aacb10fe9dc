"""A headless Chromium that tests drive through a pipe."""

import base64
import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import threading

_NAMES = ("chromium", "chromium-browser", "google-chrome")
_FLAGS = (
  *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic"),
  *("--no-first-run", "--disable-background-networking", "--disable-sync"),
  *("--disable-component-update", "--disable-dev-shm-usage"),
  *("--hide-scrollbars", "--remote-debugging-pipe"),
)
# Seconds after which a browser is killed.
_SECONDS = 120


class Browser:
  """One tab, by the DevTools protocol.

  Attributes:
    problems: what the console and the log of the tab had to say.
  """

  def __init__(self, send, receive):
    self._send, self._receive, self._count = send, receive, 0
    self._session, self._buffer, self.problems = None, b"", []
    target = self.call("Target.createTarget", url="about:blank")["targetId"]
    attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
    self._session = attached["sessionId"]
    for domain in ("Page", "Runtime", "Log", "Network"):
      self.call(f"{domain}.enable")

  def call(self, method, **parameters):
    """Returns the result of a method of the protocol."""
    self._count += 1
    message = {"id": self._count, "method": method, "params": parameters}
    if self._session:
      message["sessionId"] = self._session
    self._send.write(json.dumps(message).encode() + b"\0")
    self._send.flush()
    answer = self._wait(lambda x: x.get("id") == message["id"])
    assert "error" not in answer, answer
    return answer["result"]

  def open(self, path, *, width, is_dark=False):
    """Loads a file in a window of a width and of a reader's colour scheme."""
    scheme = "dark" if is_dark else "light"
    feature = {"name": "prefers-color-scheme", "value": scheme}
    self.call("Emulation.setEmulatedMedia", features=[feature])
    self.call(
      "Emulation.setDeviceMetricsOverride",
      **{"width": width, "height": 844, "deviceScaleFactor": 1},
      mobile=width < 600,
    )
    self.problems.clear()
    self.call("Page.navigate", url=path.absolute().as_uri())
    self._wait(lambda x: x.get("method") == "Page.loadEventFired")

  def value(self, expression):
    """Returns the value of a JavaScript expression in the page."""
    answer = self.call(
      "Runtime.evaluate", expression=expression, returnByValue=True
    )
    assert "exceptionDetails" not in answer, answer
    return answer["result"]["value"]

  def screenshot(self):
    """Returns the whole page as a PNG file."""
    picture = self.call("Page.captureScreenshot", captureBeyondViewport=True)
    return base64.b64decode(picture["data"])

  def _wait(self, is_answer):
    """Reads messages up to the one that is waited for, and returns it."""
    while message := self._read():
      method = message.get("method")
      if method in ("Log.entryAdded", "Runtime.exceptionThrown"):
        self.problems.append(message["params"])
      if method == "Runtime.consoleAPICalled":
        self.problems.append(message["params"])
      if method == "Network.requestWillBeSent":
        url = message["params"]["request"]["url"]
        if not url.startswith(("file:", "data:")):
          self.problems.append(url)
      if is_answer(message):
        return message
    raise AssertionError("the browser has ended")

  def _read(self):
    while b"\0" not in self._buffer:
      if not (received := self._receive.read1(2**16)):
        return None
      self._buffer += received
    text, _, self._buffer = self._buffer.partition(b"\0")
    return json.loads(text)


@contextlib.contextmanager
def browser(folder):
  """Starts Chromium with a profile in a folder, and yields a `Browser`."""
  paths = [path for name in _NAMES if (path := shutil.which(name))]
  assert paths, f"no browser is installed: none of {', '.join(_NAMES)}"
  child_in, to_child = os.pipe()
  from_child, child_out = os.pipe()
  # Above 3 and 4, the file descriptors that the browser expects.
  ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (child_in, child_out)]
  os.close(child_in)
  os.close(child_out)
  connect = f'exec "$@" 3<&{ends[0]} 4>&{ends[1]}'
  command = [paths[0], *_FLAGS, f"--user-data-dir={folder}", "about:blank"]
  with (
    (folder / "log").open("wb") as log,
    open(to_child, "wb") as send,
    open(from_child, "rb") as receive,
    subprocess.Popen(
      ["bash", "-c", connect, "bash", *command],
      stdout=log,
      stderr=log,
      pass_fds=ends,
    ) as process,
  ):
    for end in ends:
      os.close(end)
    timer = threading.Timer(_SECONDS, process.kill)
    timer.start()
    try:
      yield Browser(send, receive)
    finally:
      timer.cancel()
      process.kill()
