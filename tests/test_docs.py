"""What the pages tell a reader to run, runs."""

import importlib.util
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
# A comment says why a block is not run: it needs data that is not here.
BLOCK = re.compile(
  r"^(?P<not_run><!-- not run: .+ -->\n)?"
  r"```(?P<language>\w+)\n(?P<code>.*?)^```$",
  re.MULTILINE | re.DOTALL,
)


def blocks(page, language):
  return [
    match
    for match in BLOCK.finditer(page.read_text())
    if match["language"] == language
  ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python(page, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  namespace = {}
  for block in blocks(page, "python"):
    if not block["not_run"]:
      exec(compile(block["code"], page.name, "exec"), namespace)
  if "get_config" in namespace:
    namespace["get_config"]().validate()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands(page):
  """Modules, scripts, configs and targets that commands name are there."""
  targets = (ROOT / "Makefile").read_text()
  for block in blocks(page, "sh"):
    for module in re.findall(r"python -m ([\w.]+)", block["code"]):
      assert importlib.util.find_spec(module), module
    for path in re.findall(
      r"python (\w+\.py)|=(configs/\w+\.py)", block["code"]
    ):
      assert (ROOT / "".join(path)).is_file(), path
    for target in re.findall(r"^make (\w+)", block["code"], re.MULTILINE):
      assert f"\n{target}:" in targets, target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links(page):
  for link in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
    if "://" not in link:
      assert (page.parent / link).exists(), link


def test_the_front_page_is_short():
  assert len((ROOT / "README.md").read_text().split()) <= 900
