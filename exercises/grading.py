"""Judge one task: put the student's functions into the reference and run the task's grader.

A mistake in one task must not spoil another. So the module to judge is the reference, with
the student's functions in place of those that hold the task's blanks. What it imports is
the reference, too. Functions, classes and imports that a student added to the file are
kept. A mistake thus costs one task, unless the file cannot be parsed.
"""
import ast
import linecache
import signal
import textwrap
import traceback
from collections import namedtuple
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType

import torch
# Otherwise torch imports this during a task, and a time limit there leaves half a module.
import torch._dynamo  # noqa: F401

from exercises import make
from exercises.compare import CASE, Wrong, case
from exercises.wrong import WRONG

# status: "passed", "not yet", "wrong", "error" or "too slow"; why: the first line says most
Result = namedtuple("Result", "status why")

# The tasks that each property is about, and a wrong answer that is right in every number.
ABOUT = {"01_property": ["01_4"], "02_property": ["02_3"], "03_property": ["03_1", "03_3"],
         "04_property": ["04_3"], "05_property": ["05_2"], "06_property": ["06_1"]}
SLOW = "computes what the mask then hides"


class TooSlow(BaseException):
    """Not an Exception, so that a student's `except Exception` cannot swallow it."""


# -- The module to judge -------------------------------------------------------------------

@cache
def source_of(task):
    """The file that holds a task's blanks: "01_vq.py" """
    texts = {name: (make.ROOT / name).read_text(encoding="utf-8") for name in make.SOURCES}
    return next(name for name in texts if f"# Exercise {task}\n" in texts[name])


@cache
def reference(task):
    return (make.ROOT / source_of(task)).read_text(encoding="utf-8")


def build(task, text):
    """The module to judge. text: the student's file that holds the task"""
    source, solution = source_of(task), reference(task)
    module, path = ModuleType(Path(source).stem), f"student/{source}"
    module.__file__ = str(make.ROOT / source)
    exec(compile(solution, module.__file__, "exec"), vars(module))
    linecache.cache[path] = len(text), None, text.splitlines(True), path   # for tracebacks

    def run(node, names):
        exec(compile(ast.Module([node], []), path, "exec"), vars(module), names)

    tree = ast.parse(text, path)
    mine, theirs = make.functions_of(tree), make.functions_of(ast.parse(solution))
    for node in tree.body:
        new_class = isinstance(node, ast.ClassDef) and not hasattr(module, node.name)
        if new_class or isinstance(node, (ast.Import, ast.ImportFrom, ast.Assign)):
            run(node, vars(module))
    wanted = {blank.function for blank in make.find_blanks(solution) if blank.task == task}
    for name in sorted(wanted - mine.keys()):
        raise Wrong(f"{source} has no function {name}, which holds this task")
    for name, node in mine.items():
        owner, _, short = name.rpartition(".")
        if (name in wanted or name not in theirs) and (not owner or hasattr(module, owner)):
            found = {}
            run(node, found)
            setattr(getattr(module, owner) if owner else module, short, found[short])
    return module


def wrong_answer(task, name):
    """The reference's file with a wrong answer of WRONG."""
    edit, lines = WRONG[task][name], reference(task).splitlines(keepends=True)
    blanks = [blank for blank in make.find_blanks(reference(task)) if blank.task == task]
    bodies = ["".join(lines[blank.start:blank.end]) for blank in blanks]
    if isinstance(edit, str):
        indent = bodies[0][:len(bodies[0]) - len(bodies[0].lstrip())]
        bodies[0] = textwrap.indent(textwrap.dedent(edit).lstrip("\n"), indent)
    else:
        bodies = [body.replace(*edit) for body in bodies]
    for blank, body in zip(reversed(blanks), reversed(bodies)):
        lines[blank.start:blank.end] = [body]
    return "".join(lines)


# -- The judgement -------------------------------------------------------------------------

def judge(task, text, limit=20):
    """Run the grader of a task on a student's file. limit: seconds -> Result"""
    source = source_of(task)
    case()
    torch.manual_seed(0)
    try:
        with limits(limit), torch.enable_grad():
            module = build(task, text)
            if task in ABOUT:
                judge_property(getattr(module, f"property_{task[:2]}"), ABOUT[task])
            else:
                graders = import_module(f"exercises.grade_{task[:2]}")
                getattr(graders, f"grade_{task}")(module)
    except Wrong as error:
        return Result("wrong", str(error))
    except KeyboardInterrupt:
        raise
    # All other kinds: after a student's pytest.skip(), the table would lack a row.
    except BaseException as error:
        where, inputs = student_line(error, source), "".join(CASE)
        if isinstance(error, NotImplementedError) and str(error).startswith(task):
            return Result("not yet", "")
        status = "error" if where or isinstance(error, SyntaxError) else "wrong"
        if isinstance(error, TooSlow):
            status = "too slow"
        return Result(status, f"{where}{type(error).__name__}: {error}{inputs}")
    return Result("passed", "")


def student_line(error, source):
    """Where an exception left the student's file, "line 93, x = y: ", or "" if nowhere."""
    lines = [f"line {frame.lineno}, {frame.line.partition('  #')[0].strip()}: "
             for frame in traceback.extract_tb(error.__traceback__)
             if frame.filename == f"student/{source}"]
    return lines[-1] if lines else ""


def judge_property(holds, tasks):
    """A property (a function of a chapter) must accept the reference and must notice, by an
    exception, each listed wrong answer to these tasks."""
    def try_on(task, text):
        torch.manual_seed(0)
        holds(build(task, text))

    try:
        try_on(tasks[0], reference(tasks[0]))
    except AssertionError as error:
        why = student_line(error, "exercises/properties.py")
        why += "\n".join((str(error), *getattr(error, "__notes__", ())))
        raise Wrong(f"the property rejects the reference solution: {why}") from None
    for task, name in [(task, name) for task in tasks for name in WRONG[task]]:
        try:
            try_on(task, wrong_answer(task, name))
        except Exception:
            continue
        if name != SLOW:
            raise Wrong(f"the property accepts a solution of {task} that {name}")


@contextmanager
def limits(seconds):
    """TooSlow after so many seconds, then every second, because a bare `except` may swallow
    it. Windows has no such signal, and thus no limit."""
    def stop(*_):
        raise TooSlow(f"stopped after {seconds} s: does a loop never end?")

    if not hasattr(signal, "setitimer"):
        yield
        return
    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
