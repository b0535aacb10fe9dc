"""Fields of dataclasses: types, bounds and names, one line for each mistake."""

import dataclasses
from typing import Any, Literal

import pytest

from spatial_mamba_jax.errors import UserError
from spatial_mamba_jax.fields import Section, check_fields, choice, number, show


class MixerError(UserError):
  pass


@dataclasses.dataclass
class Mixer(Section):
  mistake = MixerError

  states: int = number(1, least=1, most=16)
  kind: str = choice("scan", among=lambda: ("scan", "none"))

  def validate(self, path="config.mixer"):
    super().validate(path)
    odd = self.kind == "none" and self.states > 1
    self.require(not odd, path, "states", "1 where nothing is scanned")


@dataclasses.dataclass
class Plain:
  rate: float = 0.5


@dataclasses.dataclass
class Config(Section):
  mixer: Mixer = dataclasses.field(default_factory=Mixer)
  plain: Plain = dataclasses.field(default_factory=Plain)
  steps: int = 1
  share: float = number(0.5, above=0, below=1)
  sizes: tuple[int, ...] = number((1, 2), least=1, most=9)
  pair: tuple[float, float] | None = None
  order: Literal["rows", "columns"] = "rows"
  where: str = ""
  anything: Any = None


@pytest.mark.parametrize(
  ("field", "value", "message"),
  [
    ("steps", 2**31, "config.steps must be at most 2147483647, got 2147483648"),
    ("steps", -(2**31), "config.steps must be at least -2147483647, got"),
    ("steps", True, "config.steps must be an integer, got True"),
    ("steps", 1.0, "config.steps must be an integer, got 1.0"),
    ("share", 0, "config.share must be above 0, got 0"),
    ("share", 1.0, "config.share must be below 1, got 1.0"),
    ("share", float("nan"), "config.share must be a number, got nan"),
    ("share", 10**400, "config.share must be below 1, got 1000"),
    ("share", None, "config.share must be a number, got None"),
    ("sizes", (1, 10), "config.sizes must be at most 9, got (1, 10)"),
    ("sizes", (1, 2.0), "config.sizes must be a tuple, each an integer, got"),
    ("sizes", "12", "config.sizes must be a tuple, each an integer, got '12'"),
    ("pair", (1,), "config.pair must be a tuple of 2, each a number or None"),
    ("order", "z", "config.order must be one of rows, columns, got 'z'"),
    ("where", "a\0b", "config.where must be a string, got 'a\\x00b'"),
    ("where", "\ud800", "config.where must be a string, got '\\ud800'"),
    ("mixer", None, "config.mixer must be a Mixer, got None"),
    ("mixer", Mixer, "config.mixer must be a Mixer, got the class Mixer"),
    ("mixer", Plain(), "config.mixer must be a Mixer, got a Plain"),
    ("mixer.states", 17, "config.mixer.states must be at most 16, got 17"),
    ("mixer.kind", "x", "config.mixer.kind must be one of scan, none, got 'x'"),
    ("mixer.kinds", "x", "config.mixer.kinds: no such field; did you mean"),
    ("zzz", 1, "config.zzz: no such field; choose from mixer, plain, steps"),
    ("plain.rate", "x", "config.plain.rate must be a number, got 'x'"),
    ("plain.rate", 1e39, "config.plain.rate must be at most 3.4028"),
  ],
)
def test_a_wrong_value_is_named(field, value, message):
  config = Config()
  *sections, name = field.split(".")
  section = getattr(config, *sections) if sections else config
  setattr(section, name, value)
  with pytest.raises(UserError) as caught:
    config.validate()
  assert str(caught.value).startswith(message)


def test_an_integer_of_too_many_digits_to_print():
  with pytest.raises(UserError, match=r"steps must be at most .* of type int"):
    Config(steps=10**5000).validate()


def test_accepted_values():
  config = Config(pair=(1, 0.5), sizes=(9,), anything=object())
  config.share = 1e-300
  config.where = "a/ü.py"
  config.validate()


def test_a_subclass_checks_itself_wherever_it_is():
  config = Config(mixer=Mixer(states=2, kind="none"))
  with pytest.raises(MixerError, match=r"^config\.mixer\.states must be 1 whe"):
    config.validate()
  with pytest.raises(MixerError, match=r"^run\.mixer\.states must be 1 where"):
    config.validate("run")


def test_a_deleted_field_is_missing():
  config = Config()
  del config.mixer
  with pytest.raises(UserError, match=r"^config\.mixer is missing$"):
    config.validate()


def test_fields_without_a_path():
  plain = Plain()
  plain.rate = ()
  with pytest.raises(MixerError, match=r"^rate must be a number, got \(\)$"):
    check_fields(plain, mistake=MixerError)


def test_values_are_shown_on_a_short_line():
  class Broken:
    def __repr__(self):
      raise RuntimeError

  assert show("\x1b[31m\n") == r"'\x1b[31m\n'"
  assert show(Broken()) == "a value of type Broken"
  assert len(show("x" * 10**6)) < 100
