"""Grade a student's copy: pytest exercises --student DIR [-k 02_1]"""
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
    # For a property that does without `check`.
    settings.register_profile("grading", deadline=None, derandomize=True, database=None,
                              phases=(Phase.explicit, Phase.generate, Phase.shrink))
    settings.load_profile("grading")
    config.option.reportchars, config.option.durations = "", None    # the table says it all


@pytest.fixture
def results(pytestconfig):
    return pytestconfig.stash[RESULTS]


def pytest_terminal_summary(terminalreporter, config):
    results, tasks = config.stash[RESULTS], make.read_tasks()
    write = terminalreporter.write_line
    if not results:
        write(f"no task was graded; -k takes one of {', '.join(make.graded_tasks())}")
        return
    write(f"\n{'task':<13}{'title':<40}{'minutes':>7}  {'result':<9} why")
    for task, (status, why) in results.items():
        title, minutes, _ = tasks[task]
        line = f"{task:<13}{title[:39]:<40}{minutes:>7}  {status:<9} "
        write((line + why.partition("\n")[0][:99]).rstrip(), green=status == "passed")
    passed = [status for status, _ in results.values()].count("passed")
    write(f"\n{passed} of {len(results)} tasks passed")
