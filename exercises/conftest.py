"""Grade a student's copy: pytest exercises --student DIR [-k 02_1]"""
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from exercises import make

RESULTS = {}                                 # task -> (status, why), see test_student.py


def pytest_addoption(parser):
    parser.addoption("--student", metavar="DIR", type=Path, default=make.ROOT,
                     help="the student's copy to grade (default: the solutions)")


def pytest_configure(config):
    student = config.getoption("--student")
    if not student.is_dir():
        raise pytest.UsageError(f"--student {student} is not a folder")
    # A property that does without `check` tries the same examples each time, too.
    settings.register_profile("grading", deadline=None, derandomize=True)
    settings.load_profile("grading")
    torch.set_num_threads(1)                 # inputs are small
    config.option.reportchars, config.option.durations = "", None    # the table says it all


def pytest_terminal_summary(terminalreporter):
    tasks, write = make.read_tasks(), terminalreporter.write_line
    write(f"\n{'task':<13}{'title':<40}{'minutes':>7}  {'result':<9} why")
    for task, (status, why) in RESULTS.items():
        title, minutes, _ = tasks[task]
        line = f"{task:<13}{title[:39]:<40}{minutes:>7}  {status:<9} "
        write((line + why.partition("\n")[0][:99]).rstrip(), green=status == "passed")
    passed = [status for status, _ in RESULTS.values()].count("passed")
    write(f"\n{passed} of {len(RESULTS)} tasks passed")
