"""Flags, messages and exit status, which `train.py` and `eval.py` share."""

import json
import logging
import os
import pathlib
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator

import jax
from absl import flags
from ml_collections import config_flags

from spatial_mamba_jax.errors import (
  UserError,
  one_line,
  run_command,
  say,
  silence_threads,
  tell,
)
from spatial_mamba_jax.fields import nearest, show
from spatial_mamba_jax.paths import local_path
from spatial_mamba_jax.training import config_file
from spatial_mamba_jax.training.config import TrainConfig, TrainingError
from spatial_mamba_jax.training.evaluation import Evaluated
from spatial_mamba_jax.training.loop import NonFiniteError
from spatial_mamba_jax.training.peers import end_with_peers, watching_peers
from spatial_mamba_jax.training.sharding import initialize_distributed
from spatial_mamba_jax.training.stopping import StoppedError, end_on_signals


def _define_config() -> flags.FlagHolder:
  try:
    return config_flags.DEFINE_config_file(
      "config",
      None,
      "The experiment: a file with get_config(). Each --config.FIELD=VALUE"
      " overrides a field.",
    )
  except (flags.Error, ValueError) as error:  # From reading a --flagfile.
    raise TrainingError(str(error).removeprefix("ERROR:: ")) from error


class _ConfigParser(flags.ArgumentParser):
  """Runs the config file and checks the overrides of its fields."""

  def parse(self, argument: str) -> TrainConfig:
    self.config = config_file.load_config(argument)
    config_file.check_overrides(self.config, _arguments())
    return self.config


CONFIG = _define_config()
WORKDIR = flags.DEFINE_string(
  "workdir", None, "Directory of checkpoints and logs."
)
_DISTRIBUTED = flags.DEFINE_bool(
  "distributed", False, "Share the work with the processes on other hosts."
)
_MISTAKES = (UserError, OSError, NonFiniteError, StoppedError)
_HELP = re.compile(r"--?(h|help\w*)(=.*)?")
_PARSER = flags.FLAGS["config"].parser = _ConfigParser()


def own_process() -> None:
  """Sets up the process of a script: its signals, warnings and logging.

  A signal to stop ends the process at once, unless a run saves first.
  """
  end_on_signals(_command())
  silence_threads()
  logging.basicConfig(format=f"{_command()}: %(message)s")


def run(main: Callable[[], object], usage: str | None = None) -> int:
  """Parses the flags and calls `main`; reports a mistake in one line.

  Args:
    main: the command.
    usage: the text that `--help` prints above the flags.

  Returns:
    The exit status: 0; 1 for a run that diverged or could not save; 2 for a
    mistake; 128 plus the signal for a run stopped by a signal (143 for SIGTERM,
    130 for Ctrl-C).
  """
  if any(map(_HELP.fullmatch, sys.argv[1:])):
    text = "\n".join([usage or "", *_flags_help()])
    return run_command(_command(), lambda: tell(text))
  return run_command(
    _command(),
    lambda: _run(main),
    _MISTAKES,
  )


def _run(main: Callable[[], object]) -> None:
  _parse()
  _use_compilation_cache()
  if _DISTRIBUTED.value:
    initialize_distributed()
  try:
    jax.devices()
  except RuntimeError as error:
    raise TrainingError(
      f"JAX has no device (JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS')}):"
      f" {one_line(error)}"
    ) from error
  with watching_peers(_command()):
    try:
      main()
    except StoppedError:
      raise  # All processes stop after the same step.
    except Exception as error:
      if jax.process_count() > 1:
        is_mistake = isinstance(error, _MISTAKES)
        end_with_peers(_command(), error, is_mistake=is_mistake)
      raise


def config() -> TrainConfig:
  """Returns the experiment, with its overrides, and checks it."""
  experiment = CONFIG.value
  experiment.validate()
  return experiment


def workdir() -> pathlib.Path:
  """Returns the working directory as an absolute path."""
  if not WORKDIR.value:
    raise TrainingError(
      "--workdir=DIR is needed: the directory of checkpoints and logs"
    )
  path = local_path(WORKDIR.value, "--workdir")
  if path.exists() and not path.is_dir():
    raise TrainingError(f"--workdir={WORKDIR.value} is not a directory")
  return path


def path(flag: flags.FlagHolder[str | None]) -> pathlib.Path | None:
  """Returns a flag's value as an absolute path; None where it is not set."""
  return local_path(flag.value, f"--{flag.name}") if flag.value else None


def tell_evaluations(evaluated: Evaluated, *, as_json: bool) -> None:
  """Prints one line per evaluation, or all as one line of JSON."""
  if jax.process_index():
    return
  step, evaluations = evaluated
  if as_json:
    found = {name: x.to_json() for name, x in evaluations.items()}
    tell(json.dumps({"step": step, **found}))
  else:
    when = "" if step is None else f"step {step}: "
    tell("\n".join(f"{when}{name}  {x}" for name, x in evaluations.items()))


def _command() -> str:
  return pathlib.Path(sys.argv[0]).name


def _flags_help() -> Iterator[str]:
  """Yields a line for each flag of this file and of the main script."""
  defined = flags.FLAGS.flags_by_module_dict()
  for module in (__name__, sys.argv[0]):
    for flag in defined.get(module, ()):
      yield f"  --{flag.name:<12}  {flag.help}"


def _arguments() -> list[str]:
  """Returns the arguments of the command line and of its --flagfile."""
  return flags.FLAGS.read_flags_from_files(sys.argv[1:], force_gnu=False)


def _parse() -> None:
  """Parses the flags; raises a UserError for the first wrong one."""
  try:
    names = [argument.split("=")[0] for argument in _arguments()]
    files = sum(name in ("-config", "--config") for name in names)
    if files != 1:
      what = "is given more than once" if files else "is needed"
      raise TrainingError(
        f"--config=FILE {what}; usage: python {_command()} --config=FILE"
        " --workdir=DIR [--config.FIELD=VALUE ...], or --help"
      )
    rest = flags.FLAGS(sys.argv)
  except UserError:
    raise
  except flags.UnrecognizedFlagError as error:
    near = nearest(error.flagname, flags.FLAGS)
    what = f"did you mean --{near}?" if near else "--help lists the flags"
    raise TrainingError(f"--{error.flagname}: no such flag; {what}") from error
  except flags.IllegalFlagValueError as error:
    raise _value_error(error) from error
  # For example, a MemoryError for a value of a thousand brackets.
  except Exception as error:
    raise TrainingError(one_line(error)) from error
  if rest[1:]:
    raise TrainingError(
      f"{rest[1]!r} is not a flag; flags look like --name=value"
    )


def _value_error(error: flags.IllegalFlagValueError) -> UserError:
  """Returns an error about a flag's value, in the words of the config."""
  reason = error.__context__
  if isinstance(reason, UserError):
    return reason
  text = str(error).removesuffix(f": {reason}")
  text = text.replace("flag --verbosity=", "flag --v=")
  if match := re.match(r"flag --config\.([^=]*)=", text):
    what = config_file.expected(_PARSER.config, match[1])
    value = text[match.end() :]
    return TrainingError(f"config.{match[1]} must be {what}, got {show(value)}")
  if reason:
    text += f": {' '.join(map(str, reason.args))}"
  return TrainingError(text)


def _use_compilation_cache() -> None:
  """Keeps compiled programs on disk, for later runs of the same programs."""
  # JAX continues without an entry that it cannot read or write.
  warnings.filterwarnings(
    "ignore", message="Error (reading|writing) persistent compilation cache"
  )
  if "JAX_COMPILATION_CACHE_DIR" in os.environ:
    return
  home = os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
  cache = pathlib.Path(home, "spatial_mamba_jax", "compiled").absolute()
  try:
    if home.startswith("~"):
      raise FileNotFoundError("there is no home directory")
    cache.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=cache).close()
  except OSError as error:
    say(f"{_command()}: compiled programs are not cached: {one_line(error)}")
    return
  jax.config.update("jax_compilation_cache_dir", str(cache))
