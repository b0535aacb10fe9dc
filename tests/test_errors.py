"""Commands report mistakes in one line."""

import errno
import io
import sys

import pytest

from spatial_mamba_jax.errors import (
  UserError,
  naming,
  one_line,
  reason,
  run_command,
  say,
  tell,
)


@pytest.mark.parametrize(
  ("message", "line"),
  [
    ("two\n  lines", "two lines"),
    (KeyError("no field"), "no field"),
    (ValueError(), "ValueError"),
    ("\x1b[31mred\x9b2J", r"\x1b[31mred\x9b2J"),
    ("caf\udce9 \u202egpj", r"caf\udce9 \u202egpj"),
    ("café, 図", "café, 図"),
  ],
)
def test_one_line(message, line):
  assert one_line(message) == line


class DivergedError(UserError):
  status = 7


@pytest.mark.parametrize(
  ("error", "status", "line"),
  [
    (UserError("mend\nit"), 2, "mend it"),
    (OSError(28, "No space left", "x"), 2, "x: No space left"),
    (DivergedError("diverged"), 7, "diverged"),
    (KeyboardInterrupt(), 130, "interrupted"),
    (
      ModuleNotFoundError("No module named 'grain.x'", name="grain.x"),
      2,
      'grain is missing: pip install ".[train]"',
    ),
  ],
)
def test_a_mistake_is_one_line_and_a_status(capsys, error, status, line):
  def fail():
    raise error

  assert run_command("tool", fail) == status
  assert capsys.readouterr().err == f"tool: {line}\n"


@pytest.mark.parametrize(
  "error", [ModuleNotFoundError(name="ours"), TypeError()]
)
def test_any_other_error_is_raised(error):
  def fail():
    raise error

  with pytest.raises(type(error)):
    run_command("tool", fail)


def test_a_command_decides_its_status():
  assert run_command("tool", lambda: None) == 0
  assert run_command("tool", lambda: 3) == 3


def test_an_error_of_the_system_names_its_file(tmp_path):
  def fail(error):
    try:
      with naming(tmp_path / "log"):
        raise error
    except OSError as raised:
      return one_line(raised)

  assert fail(OSError(28, "No space left")) == f"{tmp_path}/log: No space left"
  assert fail(OSError(28, "No space left", b"x")) == "x: No space left"
  assert fail(OSError("cannot be written")) == "cannot be written"


class Disconnected(io.StringIO):
  """A stream of a closed terminal."""

  def write(self, text):
    raise OSError(errno.EIO, "Input/output error")


@pytest.mark.parametrize("how", ["terminal", "descriptor"])
def test_a_closed_standard_error_takes_no_lines(monkeypatch, capsys, how):
  # Python has no standard error if a shell closes it (2>&-).
  closed = Disconnected() if how == "terminal" else None

  def fail():
    raise UserError("a mistake")

  monkeypatch.setattr(sys, "stderr", closed)
  say("a line")
  assert run_command("tool", fail) == 2
  assert capsys.readouterr().out == ""


def test_a_reason_does_not_repeat_the_path(tmp_path):
  path = tmp_path / "run"
  assert reason(OSError(13, "Permission denied", str(path)), path) == (
    "Permission denied"
  )
  below = OSError(13, "Permission denied", str(path / "lock"))
  assert reason(below, path) == f"{path}/lock: Permission denied"


def test_a_full_standard_output_is_named(monkeypatch, capsys):
  class Full(io.StringIO):
    def flush(self):
      raise OSError(28, "No space left on device")

  monkeypatch.setattr(sys, "stdout", Full())
  assert run_command("tool", lambda: tell("result")) == 2
  assert capsys.readouterr().err == (
    "tool: standard output: No space left on device\n"
  )
