"""The pages are true: their code runs, and what they name exists."""

import dataclasses
import importlib.util
import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import types

import pytest
import spatial_mamba_kernels as smk

import spatial_mamba_jax as smj
from spatial_mamba_jax.training.config_file import load_config

ROOT = pathlib.Path(__file__).parents[1]
PAGES = (
  *(ROOT / name for name in ("README.md", "CONTRIBUTING.md")),
  ROOT / "examples/README.md",
  *sorted((ROOT / "docs").rglob("*.md")),
)
# A comment before a block says why it is not run.
BLOCK = re.compile(
  r"^(?P<not_run><!-- not run: [^\n]+ -->\n)?"
  r"```(?P<language>\S+)\n(?P<code>.*?)^```$",
  re.MULTILINE | re.DOTALL,
)
# Blocks that are not code.
OTHER_LANGUAGES = {"bibtex", "text", "{eval-rst}", "{toctree}"}
# The first line of a block that is a file.
FILE = re.compile(r"# (\S+)\.py\n")
# Experiments of both tasks, whose fields the pages name.
CONFIGS = ("configs/digits.py", "configs/ade20k_upernet_tiny.py")
FOLDERS = "benchmarks|configs|docs|examples|kernels|spatial_mamba_jax|tests"


def run_page(text, monkeypatch, folder):
  """Runs a page's blocks from top to bottom, as a reader does."""
  blocks = list(BLOCK.finditer(text))
  assert 2 * len(blocks) == len(re.findall(r"^\s*```", text, re.MULTILINE))
  monkeypatch.chdir(folder)
  namespace = {}
  for block in blocks:
    language, code = block["language"], block["code"]
    assert language in {"python", "sh", *OTHER_LANGUAGES}
    if block["not_run"]:
      continue
    if language == "python":
      file = FILE.match(code)
      if file:
        name = file[1].removeprefix("kernels/").replace("/", ".")
        module = types.ModuleType(name)
        monkeypatch.setitem(sys.modules, name, module)
        run_file(code, vars(module))
      else:
        exec(compile(code, "block", "exec"), namespace)
    elif language == "sh":
      run_shell(code)


def run_file(code, namespace):
  exec(compile(code, namespace["__name__"], "exec"), namespace)
  if "get_config" in namespace:
    config = namespace["get_config"]()
    config.validate()
    config.count_steps(len(config.create_task().source("train")))


def run_shell(code, root=ROOT):
  path = f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"
  python_path = f"{root}:{ROOT / 'kernels'}"
  subprocess.run(
    ("bash", "-ec", code),
    env={**os.environ, "PATH": path, "PYTHONPATH": python_path},
    check=True,
  )


# Modules that a checkout has as scripts; tests/test_wheel.py runs them.
OF_THE_WHEEL = {"spatial_mamba_jax.train", "spatial_mamba_jax.eval"}


def check_names(text):
  """Checks modules, files, targets, attributes and config fields."""
  for module in set(re.findall(r"python -m ([\w.]+)", text)) - OF_THE_WHEEL:
    assert importlib.util.find_spec(module), module
  for path in re.findall(rf"(?<![\w/])(?:{FOLDERS})/(?!_)[\w/.-]*\w", text):
    is_block = f"# {path}\n" in text
    assert is_block or (ROOT / path).exists(), path
  targets = (ROOT / "Makefile").read_text()
  for target in re.findall(r"(?:^|`)make (\w+)", text, re.MULTILINE):
    assert f"\n{target}:" in targets, target
  for name, attribute in re.findall(r"\b(smj|smk)((?:\.\w+)+)", text):
    value = {"smj": smj, "smk": smk}[name]
    for part in attribute.split(".")[1:]:
      value = getattr(value, part)
  python = "".join(x["code"] for x in BLOCK.finditer(text) if is_python(x))
  prose = BLOCK.sub(lambda x: "" if is_python(x) else x[0], text)
  configs = [load_config(str(ROOT / path)) for path in CONFIGS]
  for field in re.findall(
    r"(?<!model\.)\bconfig\.(?!json\b)(\w[\w.]*\w)", prose
  ):
    parts = field.split(".")
    assert any(has_field(config, parts, python) for config in configs), field


def has_field(section, parts, python):
  for part in parts:
    if f"\n  {part}: " in python:  # A field of the page's own.
      return True
    if part not in {x.name for x in dataclasses.fields(section)}:
      return False
    section = getattr(section, part)
  return True


def is_python(block):
  return block["language"] == "python"


def check_links(page):
  for link in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
    if "://" not in link:
      assert (page.parent / link).exists(), link


@pytest.fixture(params=PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def page(request):
  return request.param


def test_blocks_run(page, monkeypatch, tmp_path):
  run_page(page.read_text(), monkeypatch, tmp_path)


def test_names_exist(page):
  check_names(page.read_text())


def test_no_placeholder_is_left(page):
  assert not re.search(r"@[A-Z]+@", page.read_text())


def test_links_lead_somewhere(page):
  check_links(page)


@pytest.mark.soak
def test_the_mixer_of_a_page_trains(tmp_path):
  """Writes the files of docs/add_a_mixer.md, and runs its command."""
  for name in ("spatial_mamba_jax", "configs"):
    shutil.copytree(ROOT / name, tmp_path / name)
  shutil.copy(ROOT / "train.py", tmp_path)
  blocks = BLOCK.finditer((ROOT / "docs/add_a_mixer.md").read_text())
  commands = []
  for block in blocks:
    if file := FILE.match(block["code"]):
      (tmp_path / f"{file[1]}.py").write_text(block["code"])
    elif block["language"] == "sh":
      commands.append(block["code"].strip())
  (command,) = commands
  command += ' --config.length="8 epochs"'
  run_shell(f"cd {shlex.quote(str(tmp_path))}; {command}", tmp_path)
  log = (tmp_path / "runs/pooling/metrics.jsonl").read_text().splitlines()
  last = [x for x in map(json.loads, log) if x["kind"] == "evaluation"][-1]
  assert last["top1"] > 0.8


@pytest.mark.parametrize(
  "text",
  [
    "```python\nimport spatial_mamba_jax as smj\nsmj.no_such_name\n```\n",
    "```python\n# a/file.py\n1 / 0\n```\n",
    "```sh\npython -c 'import no_such_module'\ntrue\n```\n",
    "```\nno language\n```\n",
    "```python\nno end\n",
    "    ```python\n    1 / 0\n    ```\n",
  ],
)
def test_a_broken_block_fails(text, monkeypatch, tmp_path):
  with pytest.raises((Exception, AssertionError)):
    run_page(text, monkeypatch, tmp_path)


@pytest.mark.parametrize(
  "text",
  [
    "`python -m benchmarks.no_such_module`",
    "`configs/no_such_file.py`",
    "`make no_such_target`",
    "`smj.no_such_name`",
    "`--config.model.no_such_field=1`",
  ],
)
def test_a_name_that_is_not_there_fails(text):
  with pytest.raises((AssertionError, AttributeError)):
    check_names(text)


@pytest.mark.parametrize(
  "notebook", sorted((ROOT / "docs").rglob("*.ipynb")), ids=lambda x: x.stem
)
def test_notebooks_run(notebook, tmp_path):
  cells = json.loads(notebook.read_text())["cells"]
  code = [cell for cell in cells if cell["cell_type"] == "code"]
  assert all(not cell["outputs"] for cell in code), "stored with outputs"
  copy = tmp_path / notebook.name
  copy.write_bytes(notebook.read_bytes())
  run_shell(f"python -m jupyter execute --inplace {shlex.quote(str(copy))}")
  assert "image/png" in copy.read_text()  # It draws.


def test_the_front_page_is_short():
  assert len((ROOT / "README.md").read_text().split()) <= 900
