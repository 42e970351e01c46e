"""The book as a whole: demos, who may import whom, and what README.md shows."""
import ast
import re
import runpy
import sys

import pytest
import torch
from conftest import ROOT
from PIL import Image

CHAPTERS = sorted(ROOT.glob("0*.py"))
SUPPORT = [*ROOT.glob("data/*.py"), *ROOT.glob("engine/*.py"), *ROOT.glob("report/*.py")]
README = (ROOT / "README.md").read_text()
# What the files of some folders may import; all others data, engine and report.
FOLDERS = {"data": {"data", "engine"}, "engine": {"engine"}}


def relative(path):
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", [
    pytest.param(path, marks=pytest.mark.slow) if path.name[:2] in ("01", "02") else path
    for path in CHAPTERS[:4]], ids=relative)
def test_every_demo_proves_its_claims_and_leaves_one_picture(
        path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng(devices=[]):
        runpy.run_path(str(path), run_name="__main__")
    picture = f"out/{path.stem}.png"
    assert f"wrote {picture}" in capsys.readouterr().out
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == [tmp_path / picture]
    with Image.open(tmp_path / picture) as image:
        assert min(image.size) > 100 and len(set(image.resize((50, 50)).tobytes())) > 3


def imports(tree):
    """Names of all modules that a file imports anywhere, import_module("...") included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
        elif isinstance(node, ast.Call) and "import_module" in ast.unparse(node.func):
            yield ast.literal_eval(node.args[0])


@pytest.mark.parametrize("path", [*CHAPTERS, *SUPPORT], ids=relative)
def test_the_reading_order_holds_and_no_other_package_comes_in(path):
    """A chapter imports the chapters before it, support none. Chapters 1 to 4 import
    support inside functions alone, for the picture of the demo."""
    tree = ast.parse(path.read_text(), feature_version=(3, 10))
    packages = {*sys.stdlib_module_names, "torch", "numpy", "PIL"}
    support = FOLDERS.get(relative(path.parent), {"data", "engine", "report"})
    number = int(path.name[:2]) if path in CHAPTERS else 0
    for name in imports(tree):
        if re.match(r"\d\d_", name):
            assert (ROOT / f"{name}.py").exists() and int(name[:2]) < number, name
        else:
            assert name.split(".")[0] in packages | support, name
    if path in CHAPTERS[:4]:
        top = [node for node in tree.body if not isinstance(node, ast.FunctionDef)]
        assert not {name.split(".")[0] for name in imports(ast.Module(top, []))} & support


@pytest.mark.parametrize("path", [*CHAPTERS[4:], ROOT / "README.md"], ids=relative)
def test_commands_that_are_shown_name_scripts_and_options_that_exist(cli, path):
    text = path.read_text()
    if path.suffix == ".py":
        text = ast.get_docstring(ast.parse(text))
    option = r"(?<![\w-])--[a-z][a-z-]+"
    known = {script.name: set(re.findall(option, cli(script.name, "--help").out))
             for script in CHAPTERS[4:]}
    for script, words in re.findall(r"python ([\w/.-]+\.py)([^`\n#|]*)", text):
        assert (ROOT / script).exists(), script
        typed = set(re.findall(option, words))
        assert script not in known or typed <= known[script], (script, typed)


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", README, re.DOTALL))
def test_programs_in_the_readme_run(code, monkeypatch):
    monkeypatch.chdir(ROOT)
    with torch.random.fork_rng(devices=[]):
        exec(compile(code, "README.md", "exec"), {"__name__": "__main__"})
