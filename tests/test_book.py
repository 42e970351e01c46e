"""The book as a whole: demos, who may import whom, sizes of functions, options, README."""
import ast
import contextlib
import io
import re
import runpy
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
CHAPTERS = sorted(path.name for path in ROOT.glob("0*.py"))
SUPPORT = [path for name in ("data", "engine", "report") for path in ROOT.glob(f"{name}/*.py")]
SOURCES = sorted([*ROOT.glob("*.py"), *SUPPORT])
SCRIPTS = sorted(ROOT.glob("experiments/*.py"))
EVERY_FILE = sorted([*SOURCES, *SCRIPTS, *ROOT.glob("tests/**/*.py"),
                     *ROOT.glob("exercises/[!w]*.py")])
README = ROOT / "README.md"
# What they may import; all others data, engine and report.
FOLDERS = {"data": {"data", "engine"}, "engine": {"engine"},
           "experiments": {"data", "engine", "report", "experiments"}}
LONGEST_FUNCTION, LONGEST_CHAPTER = 50, 425
LONG_CHAPTERS = {"05_train.py": 500}
MOST_OPTIONS = {"05_train.py": 40, "06_sample_and_edit.py": 22}


def relative(path):
    return str(path.relative_to(ROOT))


def each(paths):
    """One test a file, named after it."""
    return pytest.mark.parametrize("path", paths, ids=relative)


@pytest.mark.parametrize("name", [pytest.param("01_vq.py", marks=pytest.mark.slow),
                                  pytest.param("02_multiscale_vqvae.py", marks=pytest.mark.slow),
                                  "03_block_causal_mask.py", "04_var_transformer.py"])
def test_every_demo_proves_its_claims_and_leaves_one_picture(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng(devices=[]):
        runpy.run_path(str(ROOT / name), run_name="__main__")
    picture = f"out/{name.removesuffix('.py')}.png"
    assert f"wrote {picture}" in capsys.readouterr().out
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert files == [tmp_path / picture]
    with Image.open(tmp_path / picture) as image:
        assert min(image.size) > 100 and len(set(image.resize((50, 50)).tobytes())) > 3


def test_importing_a_chapter_runs_and_prints_nothing(tmp_path):
    names = [name.removesuffix(".py") for name in CHAPTERS]
    code = f"""
import sys, importlib, signal, torch
sys.path.insert(0, {str(ROOT)!r})
state, handler = torch.get_rng_state(), signal.getsignal(signal.SIGTERM)
for name in {names}:
    importlib.import_module(name)
assert torch.equal(state, torch.get_rng_state())
assert handler == signal.getsignal(signal.SIGTERM)
assert not torch.distributed.is_initialized()
"""
    done = subprocess.run([sys.executable, "-B", "-c", code], cwd=tmp_path, text=True,
                          capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())


@each(EVERY_FILE)
def test_python_3_10_reads_every_file_and_lines_and_functions_are_short(path):
    """It knows x[(..., *at)] but not x[..., *at], which newer ones take for the same."""
    text = path.read_text()
    assert max(map(len, text.splitlines()), default=0) <= 100
    for node in ast.walk(ast.parse(text, feature_version=(3, 10))):
        if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Tuple):
            starred = any(isinstance(part, ast.Starred) for part in node.slice.elts)
            assert not starred or ast.get_source_segment(text, node.slice).startswith("(")
        if isinstance(node, ast.FunctionDef) and path in SOURCES:
            assert node.end_lineno - node.lineno < LONGEST_FUNCTION, node.name
    if path.name in CHAPTERS:
        assert len(text.splitlines()) <= LONG_CHAPTERS.get(path.name, LONGEST_CHAPTER)


def imports(path):
    """Names of all modules that a file imports anywhere, import_module("...") included."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(
                ("import_module", "__import__", "run_path", "run_module")):
            yield ast.literal_eval(node.args[0])


@each([*SOURCES, *SCRIPTS])
def test_the_reading_order_holds_and_no_sixth_package_comes_in(path):
    """A chapter imports the chapters before it, an experiment any, support none."""
    allowed = {*sys.stdlib_module_names, "torch", "numpy", "PIL"}
    allowed |= FOLDERS.get(str(path.parent.relative_to(ROOT)), {"data", "engine", "report"})
    number = int(path.name[:2]) if path.name[0] == "0" else 7 * (path in SCRIPTS)
    for name in imports(path):
        if re.match(r"\d\d_", name):
            assert (ROOT / f"{name}.py").exists() and int(name[:2]) < number, name
        else:
            assert name.split(".")[0] in allowed, name


# -- Options and README ----------------------------------------------------------------------------

@pytest.fixture(scope="module")
def known():
    """Script -> the options its --help lists."""
    found = {}
    for name in MOST_OPTIONS:
        shown = io.StringIO()
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(shown):
            patch.setattr(sys, "argv", [name, "--help"])
            with pytest.raises(SystemExit):
                import_module(name.removesuffix(".py")).main()
        found[name] = set(re.findall(r"--[a-z][a-z-]*", shown.getvalue()))
    return found


@pytest.mark.parametrize("script", MOST_OPTIONS)
def test_options_stay_few(script, known):
    options = {name for name in known[script] if not name.startswith(("--no-", "--help"))}
    assert len(options) <= MOST_OPTIONS[script]


def command_lines(text):
    """(script, options) of every command that a text shows; a line ending in \\ goes on."""
    for line in text.replace("\\\n", " ").splitlines():
        for script in MOST_OPTIONS:
            if script in line:
                yield script, re.findall(r"(?<![\w-])--[a-z][a-z-]*", line.split(script, 1)[1])


@each([*SOURCES, README])
def test_commands_shown_use_options_that_exist(path, known):
    text = path.read_text()
    if path.suffix == ".py":
        text = ast.get_docstring(ast.parse(text)) or ""
    for script, options in command_lines(text):
        assert set(options) <= known[script] | {"--help"}, (script, options)


def test_the_readme_names_every_chapter_and_only_files_that_exist():
    text = README.read_text()
    assert all(name in text for name in CHAPTERS)
    text += (ROOT / "exercises" / "README.md").read_text()
    folders = "data|engine|report|experiments|exercises|tests"
    for name in set(re.findall(rf"`((?:{folders})/[\w/.-]+\.\w+|0\d_\w+\.py)`", text)):
        assert (ROOT / name).exists() or name.startswith("data/downloads"), name
