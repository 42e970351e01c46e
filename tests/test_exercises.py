"""The course: the chapters pass its graders, blanks are "not yet", listed wrong answers are
rejected, and a mistake costs one task and is met with a hint."""
import subprocess
import sys

import pytest

from exercises import grading, make
from exercises.grading import judge
from exercises.wrong import WRONG

ROOT = make.ROOT
TEXTS = make.read_tasks()
TASKS = list(TEXTS)


@pytest.mark.parametrize("task", TASKS)
def test_the_solution_passes_and_an_untouched_blank_is_not_yet(task):
    assert judge(task, grading.reference(task)) == ("passed", "")
    blank = make.with_blanks(grading.reference(task), TEXTS)
    assert judge(task, blank) == ("not yet", "")


@pytest.mark.parametrize("task, name", [(t, name) for t in TASKS for name in WRONG[t]])
def test_a_wrong_answer_fails(task, name):
    result = judge(task, grading.wrong_answer(task, name))
    assert result.status in ("wrong", "error") and result.why


def test_every_task_has_a_blank_and_every_blank_a_task():
    blanks = [blank for name in make.SOURCES
              for blank in make.find_blanks((ROOT / name).read_text())]
    assert {blank.task for blank in blanks} == set(TASKS) == WRONG.keys()
    owners = {(blank.function, blank.task) for blank in blanks}
    assert len(owners) == len({function for function, _ in owners})


def changed(old, new, task="01_1"):
    text = grading.reference(task)
    assert text.count(old) == 1
    return text.replace(old, new)


def test_a_mistake_costs_one_task_and_what_a_student_adds_is_kept():
    broken = changed("return x + (code - x).detach()", "return undefined(x)")
    gone = changed("def straight_through(", "def straight(")
    helper = changed("def lloyd_levels(", "import math as m\n\n\nHALF = m.pi / 6\n\n\n"
                     "def mean(a, b):\n    return a / b * 2 * HALF * 3 / m.pi\n\n\n"
                     "def lloyd_levels(").replace("total / count.clamp(min=1)",
                                                  "mean(total, count.clamp(min=1))")
    for text in (broken, gone, helper):
        assert judge("01_1", text) == ("passed", "")
    method = changed("        self.hits.lerp_(count, 1 - self.decay)\n",
                     "        self.move(self.hits, count)\n", "01_3").replace(
        "    def draw_vectors(", "    def move(self, a, b):\n"
        "        a.lerp_(b, 1 - self.decay)\n\n    def draw_vectors(")
    assert judge("01_3", method) == ("passed", "")


@pytest.mark.parametrize("old, new, status, why", [
    ("def lloyd_levels(", "def loyd_levels(", "wrong", "no function lloyd_levels"),
    ("idx = round_to(x, centres)", "idx = round_to(x centres)", "error", "SyntaxError"),
    ("idx = round_to(x, centres)", "idx = round_to(x, middle)", "error",
     "idx = round_to(x, middle): NameError: name 'middle' is not defined\n"
     "    with x = [0, 1, 5, 6, 7, 20]"),
    ("idx = round_to(x, centres)", "__import__('pytest').skip('no time')", "error",
     "Skipped: no time"),
    ("return centres", "return centres[:-1]", "wrong", "has shape (1,), expected (2,)"),
    ("return centres", "return centres.double()", "wrong", "has dtype torch.float64"),
    ("return centres", "return x.zero_()", "wrong", "changed its input x")])
def test_a_mistake_is_met_with_a_hint(old, new, status, why):
    text = grading.reference("01_1")
    start = text.index("def lloyd_levels(")
    text = text[:start] + text[start:].replace(old, new, 1)
    result = judge("01_1", text)
    assert result.status == status and why in result.why, result.why
    if status == "error":
        assert f"line {1 + text.split(new)[0].count(chr(10))}" in result.why


def test_ctrl_c_stops_the_grading():
    with pytest.raises(KeyboardInterrupt):
        judge("01_1", changed("idx = round_to(x, centres)  ", "raise KeyboardInterrupt #"))


def test_an_endless_loop_costs_its_task_alone():
    start = "idx = round_to(x, centres)                                  # (N,)\n"
    loop = ("while True:\n            try:\n                len(x)\n"
            "            except Exception:\n                pass\n")
    status, why = judge("01_1", changed(start, loop), limit=1.5)
    assert (status, why[:5]) == ("too slow", "line ") and "does a loop" in why, why
    assert judge("01_1", grading.reference("01_1")).status == "passed"


def test_a_copy_is_written_once_and_its_blanks_show_their_tasks(tmp_path, capsys):
    student = tmp_path / "student"
    make.main([str(student)])
    for name in make.SOURCES:
        text = (student / name).read_text()
        assert text.count('raise NotImplementedError("""0') == len(make.find_blanks(text))
    for folder, why in ((student, "is not empty"),
                        (student / "01_vq.py" / "below", "cannot make the folder"),
                        (ROOT / "data" / "mine", "lies in a folder that is copied")):
        with pytest.raises(SystemExit):
            make.main([str(folder)])
        assert why in capsys.readouterr().err


@pytest.mark.slow
def test_a_copy_runs_without_the_repository_and_is_graded_as_a_table(tmp_path):
    student = tmp_path / "student"
    make.main([str(student)])

    def run(*arguments, cwd=student):
        done = subprocess.run([sys.executable, "-B", *arguments], cwd=cwd, text=True,
                              capture_output=True)
        return done.returncode, done.stdout + done.stderr

    assert "NotImplementedError: 03_property" in run("exercises/properties.py", "03")[1]
    code, out = run("01_vq.py")
    assert code == 1 and "NotImplementedError: 01_1 Lloyd's algorithm (10 min)" in out
    assert run("05_train.py", "--help")[0] == run("06_sample_and_edit.py", "--help")[0] == 0
    right = grading.reference("01_1")
    right = right.replace("# Exercise 01_2", "# Exercise 01_2\n    1 / 0")
    (student / "01_vq.py").write_text(right)
    (student / "03_block_causal_mask.py").unlink()
    grade = "-m", "pytest", "exercises", "--student"
    code, out = run(*grade, str(student), "-k", "01_1 or 01_2 or 02_1 or 03_1", cwd=ROOT)
    assert code == 1 and "1 of 4 tasks passed" in out and "ZeroDivisionError" in out
    assert "2 failed, 1 passed, 1 skipped" in out and "Traceback" not in out
    code, out = run(*grade, str(tmp_path / "nobody"), cwd=ROOT)
    assert code == 4 and "nobody is not a folder" in out
