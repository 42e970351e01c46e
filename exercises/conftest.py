"""Grade a student's copy:

    pytest exercises --student DIR                      all tasks, and a table
    pytest exercises --student DIR -k 02_1              one
    pytest exercises --student DIR --junitxml marks.xml
"""
import sys
from pathlib import Path

import pytest
from hypothesis import Phase, settings

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from exercises import make  # noqa: E402

RESULTS = pytest.StashKey()


def pytest_addoption(parser):
    parser.addoption("--student", metavar="DIR", type=Path, default=ROOT,
                     help="the student's copy to grade (default: the solutions)")


def pytest_configure(config):
    student = config.getoption("--student")
    if not student.is_dir():
        raise pytest.UsageError(f"--student {student} is not a folder")
    config.stash[RESULTS] = {}
    # For a property without properties.check: explaining an example takes seconds.
    settings.register_profile("grading", deadline=None, derandomize=True, database=None,
                              phases=(Phase.explicit, Phase.generate, Phase.shrink))
    settings.load_profile("grading")
    # The table says it all: no list of failures, no list of the slowest.
    config.option.reportchars, config.option.durations = "", None


def pytest_collection_finish(session):
    if not session.testsfailed:              # else what could not be read is shown
        session.config.option.tbstyle = "no"


@pytest.fixture
def chapter():
    """What a grader is given: grading.judge builds it inside its time limit."""


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem):
    from exercises import grading            # takes seconds: not before --student is checked
    config, task = pyfuncitem.config, pyfuncitem.name.removeprefix("test_")
    path = config.getoption("--student") / grading.source_of(task)
    if path.is_file():
        result = grading.judge(task, path.read_text(encoding="utf-8-sig", errors="replace"))
    else:
        result = grading.Result("error", f"there is no file {path}")
    config.stash[RESULTS][task] = result
    if result.status != "passed":
        pytest.fail(f"{result.status}: {result.why}", pytrace=False)
    return True


def pytest_terminal_summary(terminalreporter, config):
    results, tasks, write = config.stash[RESULTS], make.read_tasks(), terminalreporter.write_line
    if not results:
        if not terminalreporter.stats.get("error"):
            graded = ", ".join(task for task in tasks if not task.endswith("_open"))
            write(f"no task was graded; -k takes one of {graded}")
        return
    results = {task: results[task] for task in tasks if task in results}
    write(f"\n{'task':<13}{'title':<40}{'minutes':>7}  {'result':<9} why")
    for name, (status, why) in results.items():
        task = tasks[name]
        write(f"{name:<13}{task.title[:39]:<40}{task.minutes:>7}  {status:<9} "
              f"{why.partition(chr(10))[0][:100]}".rstrip(), green=status == "passed")
    for name, (status, why) in results.items():
        if "\n" in why or len(why) > 100:
            write(f"\n{name} {status}: {why}")
    passed = [status for status, _ in results.values()].count("passed")
    write(f"\n{passed} of {len(results)} tasks passed")
