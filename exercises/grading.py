"""Judge one task: build the module to judge, run the task's grader, say what is wrong.

A mistake in one task must not spoil another. So the module to judge is the student's file in which
the functions of all *other* tasks are replaced by the reference's. Whatever it imports, chapters
and support code, is the reference's too. Helpers and imports that a student adds are kept. So a
mistake costs one task, unless the file is not Python or fails while it is imported.
"""
import ast
import linecache
import signal
import traceback
from collections import namedtuple
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType

import torch
# Else torch imports this within a task, and a time limit there would leave half a module behind.
import torch._dynamo  # noqa: F401

from exercises import make

# The reference's functions get line numbers from here on, so that an error in one of them is not
# shown as a line of the student's.
REFERENCE_LINES = 1_000_000
SMALL = 24                                   # numbers of a tensor that a message still shows

# status: "passed", "not yet", "wrong", "error" or "too slow"; why: a text, its first line says most
Result = namedtuple("Result", "status why")


class Wrong(AssertionError):
    """What a grader says about a wrong answer."""


class TooSlow(BaseException):
    """Not an Exception, so that `except Exception` in a student's code cannot swallow it."""


# -- What graders call -----------------------------------------------------------------------------

def expect(name, got, want, tolerance=1e-5, **inputs):
    """Raises Wrong unless `got` is what is wanted: first type, then shape, then dtype, then values.
    name: what is compared, as the student knows it; inputs: shown in the message where small."""
    given = "".join(f"\n    with {key} = {show(value)}" for key, value in inputs.items())
    if isinstance(want, (list, tuple)):
        if not isinstance(got, (list, tuple)) or len(got) != len(want):
            raise Wrong(f"{name} is {describe(got)}, expected {describe(want)}{given}")
        for i, pair in enumerate(zip(got, want)):
            expect(f"{name}[{i}]", *pair, tolerance, **inputs)
    elif not torch.is_tensor(want):
        close = isinstance(want, float) and isinstance(got, (int, float)) and (
            abs(got - want) <= tolerance * max(1, abs(want)))
        if not close and (type(got) is not type(want) or got != want):
            raise Wrong(f"{name} is {show(got)}, expected {show(want)}{given}")
    elif not torch.is_tensor(got):
        raise Wrong(f"{name} is {describe(got)}, expected {describe(want)}{given}")
    elif got.shape != want.shape:
        raise Wrong(f"{name}: shape {tuple(got.shape)}, expected {tuple(want.shape)}{given}")
    elif got.dtype != want.dtype:
        raise Wrong(f"{name}: dtype {got.dtype}, expected {want.dtype}{given}")
    else:
        expect_values(name, got.detach(), want.detach(), tolerance, given)


def expect_values(name, got, want, tolerance, given):
    """Two tensors of one shape and one dtype. Names the first place where they differ."""
    exact = not want.is_floating_point()
    same = got == want if exact else torch.isclose(got, want, tolerance, tolerance, equal_nan=True)
    if same.all():
        return
    place = (~same).nonzero()[0].tolist()
    at = f" at {place}" if place else ""
    pair = got[tuple(place)], want[tuple(place)]
    one, other = map(show, pair)
    if one == other:                                     # they differ in later digits
        one, other = (repr(number.item()) for number in pair)
    text = f"{name} is wrong{at}: got {one}, expected {other}"
    if 1 < want.numel() <= SMALL:
        text += f"\n    got      {show(got)}\n    expected {show(want)}"
    raise Wrong(text + given)


def gradients(name, value, *inputs):
    """The gradient of value.sum() at each input, zeros where none arrives."""
    if not torch.is_tensor(value) or not value.requires_grad:
        raise Wrong(f"{name} has no gradient: is everything detached?")
    found = torch.autograd.grad(value.sum(), inputs, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(x) if grad is None else grad for x, grad in zip(inputs, found)]


def describe(value):
    """ "a tensor of shape (2, 3)", "None", "a list of 4" """
    if torch.is_tensor(value):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, (list, tuple)):
        return f"a {type(value).__name__} of {len(value)}"
    return "None" if value is None else f"of type {type(value).__name__}"


def show(value):
    """Numbers with four digits; of what is large, the shape alone."""
    if torch.is_tensor(value):
        return show(value.tolist()) if value.numel() <= SMALL else describe(value)
    if isinstance(value, (list, tuple)) and len(value) <= SMALL:
        return f"[{', '.join(map(show, value))}]"
    return f"{value:.4g}" if isinstance(value, float) else repr(value)[:100]


def judge_property(holds, task, unseen=()):
    """A property (a function of a chapter) must accept the reference and notice every wrong answer
    to `task`: raise an exception. unseen: names of wrong answers that it need not notice"""
    try:
        holds(build(task, reference(task)))
    except AssertionError as error:
        notes = "\n".join((str(error), *getattr(error, "__notes__", ())))
        where = student_line(error, "exercises/properties.py")
        raise Wrong(f"the property rejects the reference solution: {where}{notes}") from None
    for name, text in wrong_answers(task).items():
        if name in unseen:
            continue
        try:
            holds(build(task, text))
        except Exception:
            continue
        raise Wrong(f"the property accepts a solution of {task} that {name}")


# -- The module to judge ---------------------------------------------------------------------------

@cache
def source_of(task):
    """The file that holds a task's blanks: "01_vq.py" """
    for name in make.SOURCES:
        if any(blank.task == task for blank in make.find_blanks(read_source(name))):
            return name
    raise LookupError(f"no file has a line '# Exercise {task}'")


@cache
def read_source(name):
    return (make.ROOT / name).read_text(encoding="utf-8")


def reference(task):
    return read_source(source_of(task))


@cache
def reference_functions(source):
    """-> {"Class.function": its node}"""
    tree = ast.parse(read_source(source))
    return dict(make.functions_of(ast.increment_lineno(tree, REFERENCE_LINES)))


def build(task, text):
    """The module to judge. text: the student's file that holds the task"""
    source, solution = source_of(task), reference(task)
    tree = ast.parse(text, f"student/{source}")
    mine, theirs = dict(make.functions_of(tree)), reference_functions(source)
    for blank in make.find_blanks(solution):
        if blank.task != task:
            replace(tree, blank.function, theirs[blank.function])
        elif blank.function not in mine:
            raise Wrong(f"{source} has no function {blank.function}, which holds this task")
    module = ModuleType(Path(source).stem)
    module.__file__ = str(make.ROOT / source)
    # A traceback finds its lines here.
    linecache.cache[f"student/{source}"] = len(text), None, text.splitlines(True), source
    exec(compile(tree, f"student/{source}", "exec"), module.__dict__)
    return module


def replace(tree, name, function):
    """Puts a function into a module's tree: in the place of its namesake, or at the end."""
    *classes, name = name.split(".")
    for wanted in classes:
        found = (n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == wanted)
        tree = next(found, None)
        if tree is None:                     # told at the task whose class it is
            return
    places = [i for i, node in enumerate(tree.body) if getattr(node, "name", None) == name]
    for i in places:
        tree.body[i] = function
    if not places:
        tree.body.append(function)


def wrong_answers(task):
    """-> {what it does wrong: the reference's file with that mistake}"""
    edits = import_module(f"exercises.wrong_{task[:2]}").WRONG[task]
    return {name: with_mistake(task, *edit) for name, edit in edits.items()}


def with_mistake(task, old, new):
    """The reference's file, where `new` replaces `old`, which occurs once in the task's blanks.
    old None: `new` is the whole blank."""
    text = reference(task)
    lines = text.splitlines(keepends=True)
    blanks = [blank for blank in make.find_blanks(text) if blank.task == task]
    bodies = ["".join(lines[blank.start:blank.end]) for blank in blanks]
    if old is None:
        marker = lines[blanks[0].start - 1]
        indent = marker[:len(marker) - len(marker.lstrip())]
        changed = ["".join(indent + line + "\n" for line in new.splitlines())]
    else:
        changed = [body.replace(old, new) for body in bodies]
    if len(changed) != len(bodies) or old and sum(body.count(old) for body in bodies) != 1:
        raise ValueError(f"a wrong answer to {task} must replace one place: {old!r}")
    for blank, body in zip(reversed(blanks), reversed(changed)):
        lines[blank.start:blank.end] = [body]
    return "".join(lines)


# -- The judgement ---------------------------------------------------------------------------------

def judge(task, text, limit=10):
    """Runs the grader of a task on a student's file. limit: in seconds -> Result"""
    try:
        grader = getattr(import_module(f"exercises.grade_{task[:2]}"), f"test_{task}")
        # What the chapter imports takes seconds at first: they are not the student's.
        import_module(source_of(task).removesuffix(".py").replace("/", "."))
        torch.manual_seed(0)
        with time_limit(limit), torch.enable_grad():
            grader(build(task, text))
    except TooSlow as error:
        where = student_line(error, source_of(task))
        return Result("too slow", f"{where}stopped after {limit} s: does a loop never end?")
    except Wrong as error:
        return Result("wrong", str(error))
    except SyntaxError as error:
        return Result("error", f"line {error.lineno} is not Python, {error.msg}: "
                               f"{(error.text or '').strip()}")
    # Of every kind: a student's pytest.skip(), too, would leave the table without a row.
    except BaseException as error:
        if isinstance(error, NotImplementedError) and str(error).startswith(task):
            return Result("not yet", "")
        where, message = student_line(error, source_of(task)), f"{type(error).__name__}: {error}"
        if where:
            return Result("error", where + message)
        if isinstance(error, KeyboardInterrupt):             # the teacher's Ctrl-C
            raise
        # The grader met something strange. Its own `assert`s may say what.
        return Result("wrong", message.removeprefix("AssertionError: ").split("\nassert ")[0])
    return Result("passed", "")


def student_line(error, source):
    """Where an exception left the student's file, as "line 93, x = y: ", or "" if it never was."""
    lines = [f"line {frame.lineno}, {frame.line}: "
             for frame in traceback.extract_tb(error.__traceback__)
             if frame.filename == f"student/{source}" and frame.lineno < REFERENCE_LINES]
    return lines[-1] if lines else ""


@contextmanager
def time_limit(seconds):
    """Raises TooSlow after so many seconds of computing, or six times as many by the clock: other
    processes may load the machine. Both ring every second from then on: what is raised in a
    destructor or a bare `except` gets lost. Windows has no such timers: no limit there."""
    if not hasattr(signal, "setitimer"):
        yield
        return

    def stop(*_):
        raise TooSlow

    timers = ((signal.ITIMER_PROF, signal.SIGPROF, seconds),
              (signal.ITIMER_REAL, signal.SIGALRM, 6 * seconds))
    before = [signal.signal(number, stop) for _, number, _ in timers]
    for timer, _, after in timers:
        signal.setitimer(timer, after, 1)
    try:
        yield
    finally:
        for (timer, number, _), handler in zip(timers, before):
            signal.setitimer(timer, 0)
            signal.signal(number, handler)
