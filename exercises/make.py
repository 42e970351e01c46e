"""Write a student's copy: the code with blanks, and in every blank the text of its task.

    python exercises/make.py DIR                with blanks; DIR must be new or empty
    python exercises/make.py DIR --solutions    the same files with the solutions

A blank begins below a line `# Exercise 01_1` inside a function. It ends above a line
`# End of exercise` or with the function. A task may have several blanks; a function belongs to one
task. The texts of the tasks stand in exercises/0*.md, each under `## 01_1 Title (10 min)`.
"""
import argparse
import ast
import re
import shutil
from collections import namedtuple
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CHAPTERS = sorted(path.name for path in ROOT.glob("0*.py"))
SOURCES = (*CHAPTERS, "engine/perceptual.py", "exercises/properties.py")    # may hold blanks
NEEDED = ("data", "engine", "report", "requirements.txt", "LICENSE")        # copied as they are

Task = namedtuple("Task", "title minutes text")
Blank = namedtuple("Blank", "task function start end")      # lines[start:end], "Class.function"


def read_tasks():
    """-> {"01_1": Task}, in the order of the chapters; those named 01_open have no blank"""
    tasks = {}
    for path in sorted(ROOT.glob("exercises/0*.md")):
        for section in re.split("^## ", path.read_text(encoding="utf-8"), flags=re.M)[1:]:
            head, _, text = section.partition("\n")
            name, title, minutes = re.fullmatch(r"(\w+) (.+) \((\d+) min\)", head).groups()
            tasks[name] = Task(title, int(minutes), text.strip())
    return tasks


def functions_of(tree, prefix=""):
    """Yields ("function" or "Class.method", its node) for a module's functions."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            yield prefix + node.name, node
        elif isinstance(node, ast.ClassDef):
            yield from functions_of(node, f"{prefix}{node.name}.")


@cache
def find_blanks(text):
    """The blanks of a source, from top to bottom."""
    lines, blanks = text.splitlines(), []
    for name, node in functions_of(ast.parse(text)):
        for i in range(node.lineno, node.end_lineno):
            if marker := re.fullmatch(r" +# Exercise (\w+)", lines[i]):
                inside = range(i + 1, node.end_lineno)
                ends = (n for n in inside if lines[n].strip() == "# End of exercise")
                blanks.append(Blank(marker[1], name, i + 1, next(ends, node.end_lineno)))
    return blanks


def with_blanks(text, tasks):
    """A source whose blanks raise NotImplementedError with the task's text."""
    lines = text.splitlines()
    for blank in reversed(find_blanks(text)):
        task, indent = tasks[blank.task], re.match(" *", lines[blank.start - 1])[0]
        stub = [f'raise NotImplementedError("""{blank.task} {task.title} ({task.minutes} min)',
                *(f"    {line}" if line else "" for line in task.text.splitlines())]
        stub[-1] += '""")'
        lines[blank.start:blank.end] = [indent + line if line else "" for line in stub]
    return "\n".join(lines) + "\n"


def write_copy(folder, solutions):
    for name in NEEDED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name,
                            ignore=shutil.ignore_patterns("__pycache__", "downloads"))
        else:
            shutil.copy(ROOT / name, folder / name)
    (folder / "exercises").mkdir()
    for path in ROOT.glob("exercises/0*.md"):
        shutil.copy(path, folder / "exercises")
    tasks = read_tasks()
    for name in SOURCES:
        text = (ROOT / name).read_text(encoding="utf-8")
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text if solutions else with_blanks(text, tasks),
                                   encoding="utf-8")


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", metavar="DIR", type=Path, help="new, or empty")
    parser.add_argument("--solutions", action="store_true", help="leave the solutions in")
    options = parser.parse_args(arguments)
    folder = options.folder.resolve()
    if file := next(filter(Path.is_file, (folder, *folder.parents)), None):
        parser.error(f"{file} is a file, not a folder")
    if folder.is_dir() and any(folder.iterdir()):
        parser.error(f"{folder} is not empty: nothing was written")
    if any(folder.is_relative_to(ROOT / name) for name in NEEDED):
        parser.error(f"{folder} lies in a folder that is copied")
    folder.mkdir(parents=True, exist_ok=True)
    write_copy(folder, options.solutions)
    print(f"wrote {folder}")


if __name__ == "__main__":
    main()
