"""The exercises: solutions pass, blanks are "not yet", every wrong answer fails, and one mistake
costs one task."""
import ast
import re
import subprocess
import sys
from importlib import import_module

import pytest
import torch

from exercises import grading, make

ROOT = make.ROOT
TEXTS = make.read_tasks()
TASKS = [task for task in TEXTS if not task.endswith("_open")]
SLOW = {task: [pytest.mark.slow] if task.endswith("property") else [] for task in TASKS}
WRONG = [pytest.param(task, name, id=f"{task} {name}", marks=SLOW[task]) for task in TASKS
         for name in import_module(f"exercises.wrong_{task[:2]}").WRONG.get(task, {})]

judge = grading.judge


def solution_of_01_1(old, new):
    """The text of chapter 1, changed in one place."""
    text = grading.reference("01_1")
    assert text.count(old) == 1
    return text.replace(old, new)


@pytest.mark.parametrize("task", [pytest.param(task, marks=SLOW[task]) for task in TASKS])
def test_the_solution_passes_and_an_untouched_blank_is_not_yet(task):
    assert judge(task, grading.reference(task)) == ("passed", "")
    blank = make.with_blanks(grading.reference(task), TEXTS)
    assert judge(task, blank) == ("not yet", "")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["holds_11", "holds_20", "check_it"])
@pytest.mark.parametrize("task", [task for task in TASKS if task.endswith("property")])
def test_a_property_does_not_pass_by_luck(task, name):
    """Hypothesis draws other examples if the function that it calls has another name. With 30
    examples, property_03 failed under the first two."""
    text, count = re.subn(r"\bholds\b", name, grading.reference(task))
    assert count >= 12 and judge(task, text) == ("passed", "")


@pytest.mark.parametrize("task, name", WRONG)
def test_a_wrong_answer_fails(task, name):
    result = judge(task, grading.wrong_answers(task)[name])
    assert result.status in ("wrong", "error") and result.why


def test_every_task_has_a_blank_and_three_wrong_answers_and_every_blank_a_task():
    blanks = {name: make.find_blanks((ROOT / name).read_text()) for name in make.SOURCES}
    assert {blank.task for found in blanks.values() for blank in found} == set(TASKS)
    for task in TASKS:
        assert len(grading.wrong_answers(task)) >= 3
        assert TEXTS[task].text and 5 <= TEXTS[task].minutes <= 30
    for found in blanks.values():            # a function is replaced as a whole: one task each
        held = {(blank.function, blank.task) for blank in found}
        assert len(held) == len({function for function, _ in held})


def test_mistakes_outside_a_blank_are_judged_at_their_own_task():
    broken = solution_of_01_1("return x + (code - x).detach()", "return undefined(x)")
    assert judge("01_1", broken).status == "passed"
    gone = solution_of_01_1("def straight_through(", "def straight(")
    assert judge("01_1", gone).status == "passed"
    helper = solution_of_01_1("def lloyd_levels(", "import math as m\n\n\ndef mean(a, b):\n"
                              "    return m.fsum(a) / b\n\n\ndef lloyd_levels(")
    assert judge("01_1", helper).status == "passed"


@pytest.mark.parametrize("old, new, status, why", [
    ("def lloyd_levels(", "def loyd_levels(", "wrong", "no function lloyd_levels"),
    ("idx = round_to(x, centres)", "idx = round_to(x centres)", "error",
     "is not Python, invalid syntax"),
    ("idx = round_to(x, centres)", "idx = round_to(x, middle)", "error",
     "idx = round_to(x, middle): NameError: name 'middle' is not defined"),
    ("idx = round_to(x, centres)", "raise SystemExit(3)", "error", "SystemExit: 3"),
    ("idx = round_to(x, centres)", "raise GeneratorExit", "error", "GeneratorExit"),
    ("idx = round_to(x, centres)", "raise KeyboardInterrupt", "error", "KeyboardInterrupt"),
    ("idx = round_to(x, centres)", "__import__('pytest').skip('no time')", "error",
     "Skipped: no time"),
    ("return centres", "return None", "wrong", "lloyd_levels is None, expected a tensor of shape"),
    ("return centres", "return centres[:-1]", "wrong", "shape (1,), expected (2,)"),
    ("return centres", "return centres.double()", "wrong",
     "dtype torch.float64, expected torch.float32")])
def test_a_mistake_is_met_with_a_hint(old, new, status, why):
    text = grading.reference("01_1")
    start = text.index("def lloyd_levels(")
    text = text[:start] + text[start:].replace(old, new, 1)
    result = judge("01_1", text)
    assert result.status == status and why in result.why, result.why
    if status == "error":
        number = 1 + text.split(new)[0].count("\n")
        assert f"line {number}" in result.why


def test_a_property_that_skips_is_an_error_and_ctrl_c_stops_the_grading(monkeypatch):
    skips = grading.with_mistake("01_property", None, "__import__('pytest').skip('no time')")
    result = judge("01_property", skips)
    assert result.status == "error" and "Skipped: no time" in result.why

    def interrupted(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr(grading, "build", interrupted)
    with pytest.raises(KeyboardInterrupt):
        judge("01_1", grading.reference("01_1"))


def test_a_wrong_value_is_shown_with_the_input():
    text = grading.wrong_answers("01_1")["lets an unused level jump to 0"]
    why = judge("01_1", text).why
    assert "at [1]: got 0, expected 1" in why and "x = [1, 1, 1, 1, 1, 6]" in why


def test_a_bare_yield_is_told_what_to_yield():
    result = judge("02_2", grading.wrong_answers("02_2")["yields nothing"])
    assert result == ("wrong", "round 0 yields None, expected x, tokens_k and f_hat")


def test_numbers_that_differ_late_are_shown_with_all_digits():
    with pytest.raises(grading.Wrong, match="got 1.00004.*, expected 1.0$"):
        grading.expect("x", torch.tensor([1 + 5e-5]).double(), torch.ones(1).double())


def test_an_answer_that_rounds_to_float32_passes():
    text = grading.with_mistake("03_2", None, (
        "factor = q.shape[-1] ** -0.5 if qk_factor is None else qk_factor\n"
        "scores = factor * q @ k.transpose(-2, -1)\n"
        "scores = scores if mask is None else scores.masked_fill(~mask, -torch.inf)\n"
        "return scores.float().softmax(-1).to(q.dtype) @ v\n"))
    assert judge("03_2", text) == ("passed", "")


@pytest.mark.parametrize("loop", ["while True:\n            pass",
                                  "import time\n        while True:\n            time.sleep(9)",
                                  "while True:\n            try:\n                x.sort()\n"
                                  "            except Exception:\n                pass"])
def test_an_endless_loop_costs_its_task_alone(loop):
    start = "idx = round_to(x, centres)\n        total"
    endless = solution_of_01_1(start, loop + "\n        total")
    status, why = grading.judge("01_1", endless, limit=0.1)
    first = endless[:endless.index("while True:")].count("\n") + 1
    lines = range(first, first + loop.count("\n") + 1)
    assert status == "too slow" and int(re.match(r"line (\d+), ", why)[1]) in lines
    assert grading.judge("01_1", grading.reference("01_1")).status == "passed"


def test_a_copy_is_written_once_and_its_blanks_show_their_tasks(tmp_path, capsys):
    make.main([str(tmp_path / "student")])
    for name in make.SOURCES:
        text = (tmp_path / "student" / name).read_text()
        ast.parse(text)
        assert text.count("raise NotImplementedError(\"\"\"0") == len(make.find_blanks(text))
    (tmp_path / "student" / "01_vq.py").write_text("my work")
    with pytest.raises(SystemExit):
        make.main([str(tmp_path / "student")])
    assert "is not empty" in capsys.readouterr().err
    assert (tmp_path / "student" / "01_vq.py").read_text() == "my work"
    with pytest.raises(SystemExit):
        make.main([str(tmp_path / "student" / "01_vq.py" / "below")])
    assert "01_vq.py is a file, not a folder" in capsys.readouterr().err
    make.main([str(tmp_path / "solutions"), "--solutions"])
    for name in make.SOURCES:
        assert (tmp_path / "solutions" / name).read_bytes() == (ROOT / name).read_bytes()


@pytest.mark.slow
def test_a_folder_that_is_not_there_or_a_task_that_is_not_there_has_a_line(tmp_path):
    def grade(*arguments):
        return subprocess.run([sys.executable, "-m", "pytest", "exercises", *arguments], cwd=ROOT,
                              text=True, capture_output=True)

    refused = grade("--student", str(tmp_path / "nobody"))
    assert refused.returncode == 4 and "nobody is not a folder" in refused.stderr
    assert "no task was graded; -k takes one of 01_1, " in grade("-k", "09_9").stdout


@pytest.mark.slow
def test_a_copy_runs_without_the_repository_and_is_graded_as_a_table(tmp_path):
    student, marks = tmp_path / "student", tmp_path / "marks.xml"
    make.main([str(student)])

    def run(*arguments, cwd=student):
        done = subprocess.run([sys.executable, "-B", *arguments], cwd=cwd, text=True,
                              capture_output=True)
        return done.returncode, done.stdout + done.stderr

    for path in ROOT.glob("exercises/0*.md"):
        assert (student / "exercises" / path.name).read_bytes() == path.read_bytes()
    assert run("exercises/properties.py", "03") == (1, "fill 03_property first\n")
    code, out = run("01_vq.py")
    assert code == 1 and "NotImplementedError: 01_1 Lloyd's algorithm (10 min)" in out
    assert run("05_train.py", "--help")[0] == run("06_sample_and_edit.py", "--help")[0] == 0
    right = grading.reference("01_1").replace("# Exercise 01_2", "# Exercise 01_2\n    1 / 0")
    (student / "01_vq.py").write_text(right)
    (student / "03_block_causal_mask.py").unlink()
    (student / "03_block_causal_mask.py").mkdir()
    code, out = run("-m", "pytest", "exercises", "--student", str(student), "-k",
                    "01_1 or 01_2 or 03_1", "--junitxml", str(marks), cwd=ROOT)
    assert code == 1 and "1 of 3 tasks passed" in out
    assert "ZeroDivisionError" in out and 'failures="2"' in marks.read_text()
    assert "Traceback" not in out and "= FAILURES =" not in out
