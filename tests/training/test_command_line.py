"""The scripts report mistakes in one line, and eval.py prints scores."""

import json
import os
import pathlib
import re
import resource
import signal
import subprocess
import sys
import time

import jax
import pytest
from absl import flags

from spatial_mamba_jax.training import command_line

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def run_here(experiment, monkeypatch, capsys):
  """Runs a command in this process; returns (status, output, error)."""
  # Otherwise the tests would use the user's cache.
  monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", os.devnull)

  def run(*arguments, text=None, command=command_line.config):
    for name in [x for x in flags.FLAGS if x.startswith("config.")]:
      delattr(flags.FLAGS, name)
    flags.FLAGS.unparse_flags()
    if text is not None:
      mode = "wb" if isinstance(text, bytes) else "w"
      with open(experiment.path, mode) as file:
        file.write(text)
    if not any(x.startswith("--config=") for x in arguments):
      arguments = (f"--config={experiment.path}", *arguments)
    argv = ["train.py", *(x for x in arguments if x != "--config=none")]
    monkeypatch.setattr(sys, "argv", argv)
    status = command_line.run(command, "Trains.")
    return status, *capsys.readouterr()

  yield run
  flags.FLAGS.unparse_flags()
  flags.FLAGS.mark_as_parsed()


def assert_one_line(result, *parts):
  status, out, err = result
  assert (status, out) == (2, ""), err
  (line,) = err.splitlines()
  assert line.startswith("train.py: ")
  assert line.isprintable()
  for part in parts:
    assert part in line


OVERRIDES = {
  "checkpoint_every=5 days": "config.checkpoint_every must be like"
  """ "10 minutes" or "10 epochs" or "10 steps", got '5 days'""",
  "batch_sise=8": "--config.batch_sise: no such field; did you mean"
  " --config.batch_size?",
  "optimiser.learning_rate=1": "did you mean --config.optimizer.learning_rate?",
  "learning_rate=1": "did you mean --config.optimizer.learning_rate?",
  "model.drop_path=1": "did you mean --config.model.drop_path_rate?",
  "zzz=1": "--config.zzz: no such field; choose from task, model, data, optim",
  "=1": "--config.: no such field; choose from task, model",
  "length.x=1": "did you mean --config.length?",
  "data.crop_scale[0]=1": "did you mean --config.data.crop_scale?",
  "model.build=1": "--config.model.build: no such field",
  "data.__class__=1": "--config.data.__class__: no such field",
  "\x1b[31m=1": r"--config.\x1b[31m: no such field",
  "task.mixing=1": "--config.task.mixing is a section; override its fields pr",
  "mixing.probability=1": "did you mean --config.task.mixing.probability?",
  "label_smoothing=1": "did you mean --config.task.label_smoothing?",
  "epochs=3": "did you mean --config.length?",
  "optimizer.warmup_epochs=1": "did you mean --config.optimizer.warmup?",
  "model.num_classes=3": "did you mean --config.task.num_classes?",
  "model.d_state=2": "did you mean --config.model.mixer.d_state?",
  "task=1": "--config.task is a section; override its fields num_classes",
  "model": "--config.model is a section; override its fields name",
  "model.mixer=1": "--config.model.mixer is a section; override its fields d_",
  "keep_last=many": "config.keep_last must be an integer, got 'many'",
  "keep_last=": "config.keep_last must be an integer, got ''",
  "keep_last=8.0": "config.keep_last must be an integer, got '8.0'",
  "keep_last=None": "config.keep_last must be an integer, got 'None'",
  "keep_last=" + "9" * 5000: "config.keep_last must be an integer, got '999",
  "keep_last": "Missing value for flag --config.keep_last",
  **{
    f"length={text}": 'config.length must be like "10 epochs" or "10 steps",'
    f" got '{text[:70]}"
    for text in ("many", "", "8.0", "8", "None", "9" * 5000)
  },
  "length": "Missing value for flag --config.length",
  "linear_probe=maybe": "config.linear_probe must be True or False, got 'mayb",
  "ema_decay=high": "config.ema_decay must be a number, got 'high'",
  "ema_decay=nan": "config.ema_decay must be a number, got nan",
  "mesa_weight=1e999": "config.mesa_weight must be at most 1000000, got inf",
  "batch_size=0": "config.batch_size must be at least 1, got 0",
  "seed=-1": "config.seed must be at least 0, got -1",
  "optimizer.warmup=9 epochs": "config.optimizer.warmup must be shorter than"
  " length=8 epochs, got '9 epochs'",
  "task.num_classes=0": "config.task.num_classes must be at least 1, got 0",
  "model.name=vit": "config.model.name must be one of spatial_mamba_base,",
  "model.name=\x1b[31m": r"got '\x1b[31m'",
  "model.dtype=": "config.model.dtype must be one of bfloat16, float16, float3",
  "model.mixer.implementation=cuda": "config.model.mixer.implementation must b",
  "model.mixer.d_state=many": "config.model.mixer.d_state must be an integer",
  "model.mixer.d_states=2": "did you mean --config.model.mixer.d_state?",
  "model.dims=(4": "config.model.dims must be a tuple, each an integer, got",
  "data.name=mnist": "config.data.name must be one of digits, imagenet2012",
  "data.test_crop_ratio=1.2": "config.data.test_crop_ratio must be at most 1",
  "data.crop_scale=": "config.data.crop_scale must be a tuple of 2, each a num",
  "data.crop_scale=0.5": "config.data.crop_scale must be a tuple of 2",
  "data.crop_scale=('a','b')": "config.data.crop_scale must be a tuple of 2",
  "data.crop_scale=(0.5,": "config.data.crop_scale must be a tuple of 2",
  "data.crop_scale=" + "(" * 9999: "config.data.crop_scale must be a tuple",
}


def test_a_wrong_override_is_one_line(run_here):
  for override, message in OVERRIDES.items():
    assert_one_line(run_here(f"--config.{override}"), message)


FLAGS = {
  ("--workdirr=x",): "--workdirr: no such flag; did you mean --workdir?",
  ("--zzzzzz",): "--zzzzzz: no such flag; --help lists the flags",
  ("--noconfig.length",): "--noconfig.length: no such flag; did you mean",
  ("--workdir",): "Missing value for flag --workdir",
  ("--distributed=maybe",): "--distributed=maybe",
  ("--flagfile=no/such",): "no/such",
  ("extra",): "'extra' is not a flag",
  ("--config=a.py", "--config=b.py"): "--config=FILE is given more than once",
  ("--config=no/such.py:x",): "--config=no/such.py:x is not a file",
  ("--config=/dev/zero",): "--config=/dev/zero is not a file",
  (f"--config={ROOT}",): "is not a file",
  ("--config=",): "--config= is not a file",
  ("--config=none",): "--config=FILE is needed; usage: python train.py",
  (
    "--config=none",
    "--config.length=3 epochs",
  ): "--config=FILE is needed; usage:",
}


def test_a_wrong_flag_is_one_line(run_here):
  for arguments, message in FLAGS.items():
    assert_one_line(run_here(*arguments), message)
  result = run_here("--workdir=", command=command_line.workdir)
  assert_one_line(result, "--workdir=DIR is needed")
  result = run_here("--workdir=gs://bucket/run", command=command_line.workdir)
  assert_one_line(
    result, "--workdir must be a directory of this machine, got gs://bucket/run"
  )


IMPORT = (
  "from spatial_mamba_jax.training.config import TrainConfig;"
  " from spatial_mamba_jax.tasks.classification import"
  " ClassificationConfig as Task\n"
)
# (content of a config file, number of the wrong line, message).
FILES = [
  ("def get_config(:\n", 1, "SyntaxError: invalid syntax"),
  ("\nx='\n", 2, "SyntaxError: unterminated string"),
  ("def f():\nreturn 1\n", 2, "IndentationError: expected an indented block"),
  ("(" * 3000, 1, "SyntaxError: too many nested parentheses"),
  (b"x=1\ny=2\n\0", 3, "SyntaxError: a NUL byte is not text"),
  (b"\n\nx='\xe9'\n", 3, "SyntaxError: "),
  (b"\x7fELF\x02\x01\xff\xfe\0\0", 1, "SyntaxError: "),
  ("import json\nimport no_such\n", 2, "ModuleNotFoundError: No module named"),
  ("from json import lods\n", 1, "ImportError: cannot import name 'lods'"),
  ("raise SystemExit(0)\n", 1, "SystemExit: 0"),
  ("\nimport sys\nsys.exit('a\\n\\x1b[31m')\n", 3, r"SystemExit: a \x1b[31m"),
  ("\n\nfoo\n", 3, "NameError: name 'foo' is not defined"),
  ("{}['key']\n", 1, "KeyError: key"),
  ("assert False\n", 1, "AssertionError"),
  ("class E(BaseException): pass\nraise E\n", 2, "E"),
  ("class E(Exception):\n  __str__ = None\nraise E\n", 3, "E"),
  ("def f(): f()\nf()\n", 1, "RecursionError: maximum recursion depth"),
  ("open('/no/such')\n", 1, "FileNotFoundError: /no/such: No such file"),
  ("raise ValueError('x' * 10**6)\n", 1, "ValueError: xxx"),
  ("def get_config():\n  return f()\ndef f():\n  1 / 0\n", 4, "ZeroDivision"),
  ("import re\ndef get_config():\n  re.compile('(')\n", 3, "error: missing )"),
  ("def get_config():\n  pass\n", 1, "get_config() must return a TrainConfig"),
  ("def get_config(x):\n  pass\n", 1, "TypeError: get_config() missing 1 req"),
  ("async def get_config(): pass\n", 1, "it has no plain function get_conf"),
  ("get_config = 3\n", None, "it has no plain function get_config()"),
  ("", None, "it has no plain function get_config()"),
  (
    IMPORT + "def get_config():\n  return TrainConfig\n",
    2,
    "must return a Tra",
  ),
  (
    IMPORT
    + "def get_config():\n  return TrainConfig(task=Task(), batch_sise=8)\n",
    *(3, "keyword argument 'batch_sise'; did you mean batch_size?"),
  ),
  (
    IMPORT + "def get_config():\n  TrainConfig(task=Task()).a.b\n",
    *(3, "AttributeError"),
  ),
  (
    IMPORT + "def get_config():\n  return TrainConfig()\n",
    *(3, "TypeError: missing a required argument: 'task'"),
  ),
]
# (statements on a TrainConfig in get_config, arguments, message).
CHANGES = [
  (
    "c.length = 'many'",
    (),
    """config.length must be like "10 epochs" or "10""",
  ),
  ("c.length = 8", (), "config.length must be a string, got 8"),
  ("c.seed = 'many'", (), "config.seed must be an integer, got 'many'"),
  ("c.seed = 'many'", ("seed=3",), "config.seed must be an integer, got"),
  ("c.batch_size = 8.0", (), "config.batch_size must be an integer, got 8.0"),
  ("c.model = None", (), "config.model must be a ModelSection, got None"),
  (
    "c.model = None",
    ("model.mixer.d_state=2",),
    "config.model must be a ModelSectio",
  ),
  ("c.data = {'name': 'x'}", (), "config.data must be a DataConfig, got {'nam"),
  (
    "c.data = c.model",
    (),
    "config.data must be a DataConfig, got a ModelSecti",
  ),
  (
    "c.task.mixing = type(c)",
    (),
    "config.task.mixing must be a MixingConfig, got th",
  ),
  ("c.task = c.model", (), "config.task must be a TaskConfig, got a ModelSect"),
  ("c.model.mixer = None", (), "config.model.mixer must be a MixerConfig, got"),
  ("del c.optimizer", (), "config.optimizer is missing"),
  ("c.batch_sise = 3", (), "config.batch_sise: no such field; did you mean ba"),
  ("c.optimizer.lr = 3", (), "config.optimizer.lr: no such field; choose from"),
]


def test_a_wrong_config_file_is_one_line(experiment, run_here):
  for text, line, message in FILES:
    where = f"{experiment.path}:{line}: " if line else f"{experiment.path}: "
    assert_one_line(run_here(text=text), where, message)
    assert not list(experiment.path.parent.glob("__pycache__"))
  for change, overrides, message in CHANGES:
    text = (
      f"{IMPORT}def get_config():\n  c = TrainConfig(task=Task())\n  {change}\n"
    )
    arguments = [f"--config.{override}" for override in overrides]
    assert_one_line(run_here(*arguments, text=f"{text}  return c\n"), message)


def test_flags_override_fields(experiment, run_here, tmp_path):
  seen = []
  text = experiment.path.read_text().replace(
    "def get_config():\n", "def get_config(word=''):\n  assert word != 'bad'\n"
  )
  flagfile = tmp_path / "flags"
  flagfile.write_text("--config.seed=7\n")
  result = run_here(
    f"--config={experiment.path}:good",
    "--noconfig.linear_probe",
    "--config.batch_size=4",
    *("-config.length", "3 epochs"),
    "--config.optimizer.warmup=5 steps",
    "--config.task.mixing.probability=0.25",
    "--config.model.mixer.d_state=2",
    "--config.model.dims=(4,6)",
    *("--config.data.crop_scale=0.5", "--config.data.crop_scale=1"),
    "--config.batch_size=16",
    f"--flagfile={flagfile}",
    text=text,
    command=lambda: seen.append(command_line.config()),
  )
  assert result == (0, "", "")
  (config,) = seen
  assert (config.length, config.seed, config.batch_size) == ("3 epochs", 7, 16)
  assert config.optimizer.warmup == "5 steps"
  assert config.task.mixing.probability == 0.25
  assert config.model.mixer.d_state == 2
  assert config.model.dims == (4, 6)
  assert config.data.crop_scale == (0.5, 1)
  result = run_here(f"--config={experiment.path}:bad")
  assert_one_line(result, f"{experiment.path}:9: AssertionError")


@pytest.mark.parametrize("flag", ["--help", "-h", "-help", "--helpfull"])
def test_help(run_here, flag):
  status, out, err = run_here("--config=none", flag)
  assert (status, err) == (0, "")
  assert out.startswith("Trains.\n")
  assert re.findall(r"^  --(\w+) ", out, re.MULTILINE) == [
    *("config", "workdir", "distributed")
  ]


def test_a_run_without_a_compilation_cache(monkeypatch, tmp_path, capsys):
  used = []
  monkeypatch.setattr(jax.config, "update", lambda _, path: used.append(path))
  monkeypatch.setattr(sys, "argv", ["train.py"])
  monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)

  def use(home):
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))
    command_line._use_compilation_cache()
    return capsys.readouterr().err

  assert use(tmp_path) == ""
  cache = tmp_path / "spatial_mamba_jax" / "compiled"
  assert used == [str(cache)]
  assert not list(cache.iterdir())
  file = tmp_path / "file"
  file.write_text("")
  for home in (file, "/proc/no", "/dev/null", "~nobody_of_that_name/x"):
    (line,) = use(home).splitlines()
    assert line.startswith("train.py: compiled programs are not cached: ")
  # Neither $HOME nor an entry for this user.
  monkeypatch.setattr(os.path, "expanduser", lambda path: path)
  assert "there is no home directory" in use("")
  assert used == [str(cache)]


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["--config.task.num_classes=5"], "set --config.task.num_classes=3"),
    (["--config.data.name=image_folder", "--config.data.data_dir=no"], "no"),
    (["--config.batch_size=32"], "larger than the 24 training images"),
    (["--config.batch_sise=8"], "did you mean --config.batch_size?"),
    (["--workdir=train.py/run"], "cannot write to"),
    (["--workdir= "], "--workdir must be a path"),
    (["--flagfile=/no/such"], "Unable to open flagfile: [Errno 2] No such"),
    (["--distributed=maybe"], "--distributed=maybe: Non-boolean argument"),
    (["--v=loud"], "flag --v=loud: invalid literal"),
  ],
)
def test_a_mistake_is_one_line(experiment, tmp_path, arguments, message):
  status, out, err = experiment.run(
    "train.py", f"--workdir={tmp_path / 'run'}", *arguments
  )
  assert status == 2, err
  (line,) = err.splitlines()
  assert line.startswith("train.py: ")
  assert message in line
  assert not out
  assert not (tmp_path / "run" / "checkpoints").exists()


def test_no_device_is_one_line(experiment, tmp_path):
  result = experiment.run(
    "train.py", f"--workdir={tmp_path / 'run'}", JAX_PLATFORMS="nonsense"
  )
  assert_one_line(result, "JAX has no device (JAX_PLATFORMS=nonsense): ")


@pytest.mark.parametrize(
  ("script", "package"),
  [
    ("train.py", "absl"),
    ("train.py", "ml_collections"),
    ("train.py", "grain"),
    ("eval.py", "orbax"),
    ("eval.py", "absl"),
    ("spatial_mamba_jax.report", "matplotlib"),
    ("spatial_mamba_jax.visualize", "PIL"),
  ],
)
def test_a_missing_package_is_one_line(tmp_path, script, package):
  is_module = not script.endswith(".py")
  arguments = ["--config=configs/digits.py", f"--workdir={tmp_path / 'run'}"]
  if is_module:
    arguments = [str(tmp_path) if script.endswith("report") else "erf"]
    record = {"step": 1, "kind": "train", "loss": 1.0}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(record) + "\n")
  run = f"runpy.run_{'module' if is_module else 'path'}"
  result = subprocess.run(
    (
      *(sys.executable, "-c"),
      f"import runpy, sys; sys.modules[{package!r}] = None;"
      f" sys.argv = {[script, *arguments]};"
      f" {run}({script!r}, run_name='__main__')",
    ),
    cwd=ROOT,
    env={
      **os.environ,
      "JAX_PLATFORMS": "cpu",
      "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}",
    },
    capture_output=True,
    text=True,
    timeout=600,
  )
  assert result.returncode == 2, result.stderr
  name = script.rpartition("spatial_mamba_jax.")[2]
  assert (
    result.stderr == f'{name}: {package} is missing: pip install ".[train]"\n'
  )


def handles_interrupts(process):
  """Whether Python's or another handler of SIGINT is installed."""
  status = pathlib.Path(f"/proc/{process.pid}/status").read_text()
  caught = int(re.search(r"SigCgt:\s*(\w+)", status)[1], 16)
  return bool(caught & 1 << signal.SIGINT - 1)


@pytest.mark.parametrize("script", ["train.py", "eval.py"])
def test_interrupts_at_any_moment_leave_no_traceback(
  experiment, tmp_path, script
):
  for seconds in (0, 0.1, 0.3, 0.6, 1, 1.5, 2.5):
    process = experiment.start(
      script, f"--workdir={tmp_path / 'run'}", "--config.length=100000 epochs"
    )
    # Python itself installs a handler before the script can do anything.
    while process.poll() is None and not handles_interrupts(process):
      time.sleep(0.001)
    while process.poll() is None and handles_interrupts(process):
      time.sleep(0.001)
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=600)
    assert "Traceback" not in err, (seconds, err)
    if script == "train.py":
      assert process.returncode in (-signal.SIGINT, 130), (seconds, err)


@pytest.mark.soak
def test_divergence_stops_and_keeps_the_last_good_checkpoint(
  experiment, tmp_path
):
  workdir = tmp_path / "run"
  # A learning rate of 1e30 leaves weights with a NaN loss.
  status, _, err = experiment.run(
    "train.py",
    f"--workdir={workdir}",
    "--config.optimizer.learning_rate=1e38",
    "--config.optimizer.warmup=2 epochs",
  )
  assert status == 1
  last = err.splitlines()[-1]
  step = int(re.search(r"of step (\d+) is not finite", last)[1])
  kept = [int(path.name) for path in (workdir / "checkpoints").glob("[0-9]*")]
  assert all(checkpoint < step for checkpoint in kept)


@pytest.mark.soak
def test_evaluation(experiment, tmp_path):
  workdir = tmp_path / "run"
  flag = f"--workdir={workdir}"
  status, _, err = experiment.run("eval.py", flag)
  assert status == 2
  assert "does not exist: train first" in err.splitlines()[-1]
  status, _, err = experiment.run("train.py", flag, "--config.length=3 epochs")
  assert status == 0, err
  status, out, err = experiment.run("eval.py", flag)
  assert status == 0, err
  numbers = (
    r"  top-1 \d+\.\d\d%  top-5 100\.00%  loss \d+\.\d{4}  ECE \d+\.\d\d%"
    r"  images 24\n"
  )
  found = re.fullmatch(rf"step (\d): ema{numbers}step \1: raw{numbers}", out)
  assert found
  logged = experiment.records(workdir)
  scores = {x["step"]: x["top1"] for x in logged if x["kind"] == "evaluation"}
  # Among equal scores, the latest is the best.
  best = max(scores, key=lambda step: (scores[step], step))
  assert int(found[1]) == best
  # Four devices evaluate a model that one device has trained.
  status, text, err = experiment.run(
    "eval.py",
    f"--checkpoint={workdir / 'checkpoints' / '9'}",
    "--json",
    devices=4,
  )
  assert status == 0, err
  (line,) = text.splitlines()
  logged = experiment.records(workdir)[-2:]
  assert [r["kind"] for r in logged] == ["evaluation", "evaluation_raw"]
  evaluations = json.loads(line)
  assert evaluations["step"] == 9
  assert evaluations["ema"]["loss"] != evaluations["raw"]["loss"]
  for name, record in zip(("ema", "raw"), logged, strict=True):
    evaluation = evaluations[name]
    assert record.keys() == {"step", "kind"} | evaluation.keys()
    assert evaluation["images"] == 24
    assert evaluation["loss"] == pytest.approx(record["loss"], rel=1e-5)
    assert evaluation["ece"] == pytest.approx(record["ece"], rel=1e-4)
    assert evaluation["top1"] == record["top1"]
  status, _, err = experiment.run(
    "eval.py", flag, "--config.model.mixer.d_state=2"
  )
  assert status == 2
  assert "a model other than config.model" in err.splitlines()[-1]


@pytest.mark.soak
def test_evaluation_at_another_resolution_and_crop(experiment, tmp_path):
  flag = f"--workdir={tmp_path / 'run'}"
  status, _, err = experiment.run("train.py", flag, "--config.length=2 epochs")
  assert status == 0, err

  def evaluate(*arguments):
    status, out, err = experiment.run("eval.py", flag, "--json", *arguments)
    assert status == 0, err
    return out

  test_time = evaluate("--resolution=20", "--crop_ratio=0.5")
  assert test_time == evaluate(
    "--config.data.image_size=20", "--config.data.test_crop_ratio=0.5"
  )
  in_the_way = tmp_path / "file"
  in_the_way.write_text("")
  for argument, message in (
    ("--resolution=0", "--resolution=0"),
    (
      "--crop_ratio=0",
      "config.data.test_crop_ratio must be at least 0.0625, got 0.0",
    ),
    (f"--output_dir={in_the_way}", f"cannot write to {in_the_way}"),
  ):
    status, out, err = experiment.run("eval.py", flag, argument)
    assert (status, out) == (2, "")
    (line,) = err.splitlines()
    assert message in line


@pytest.mark.soak
def test_a_full_disk_is_one_line_and_costs_no_checkpoint(experiment, tmp_path):
  """A limit on file sizes simulates it: saves fail, and the log does not."""
  workdir = tmp_path / "run"
  flag = f"--workdir={workdir}"
  status, _, err = experiment.run("train.py", flag, "--config.length=2 epochs")
  assert status == 0, err
  (workdir / "checkpoints" / "6").rename(tmp_path / "6")
  process = experiment.start(
    "train.py",
    flag,
    "--config.length=2 epochs",
    JAX_ENABLE_COMPILATION_CACHE="false",
  )
  resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (8192, 8192))
  _, err = process.communicate()
  assert process.returncode == 1, err
  told = [
    line
    for line in err.splitlines()
    if not line.startswith(("step ", "memory per device: planned "))
  ]
  assert told == [
    f"resuming {workdir} after step 3",
    f"train.py: the checkpoint of step 6 cannot be saved in"
    f" {workdir / 'checkpoints'}: File too large; the newest is of step 3;"
    " the same command resumes once it can be written",
  ]
  status, _, err = experiment.run("train.py", flag, "--config.length=2 epochs")
  assert status == 0, err
  assert err.startswith(f"resuming {workdir} after step 3\n")
