"""Write a student's copy: the code with blanks, and in every blank the text of its task.

    python exercises/make.py DIR                DIR must be new or empty

A blank begins below a line `# Exercise 01_1` in a function and ends above a line
`# End of exercise` or with the function, which holds blanks of one task only. The texts are
in exercises/0*.md, under `## 01_1 Title (10 min)`.
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
SOURCES = (*CHAPTERS, "engine/perceptual.py", "exercises/properties.py")   # with blanks
COPIED = ("data", "engine", "report", "experiments/figures", "experiments/README.md",
          "exercises/README.md", "README.md", "requirements.txt", "LICENSE")
END = "# End of exercise"

Task = namedtuple("Task", "title minutes text")
Blank = namedtuple("Blank", "task function start end")      # lines[start:end] of a file


def read_tasks():
    """-> {"01_1": Task}, in the order of the chapters, without open tasks, which have no
    blank"""
    tasks = {}
    for path in sorted(ROOT.glob("exercises/0*.md")):
        for section in re.split("^## ", path.read_text(encoding="utf-8"), flags=re.M)[1:]:
            head, _, text = section.partition("\n")
            name, title, minutes = re.fullmatch(r"(\w+) (.+) \((\d+) min\)", head).groups()
            if not name.endswith("_open"):
                tasks[name] = Task(title, int(minutes), text.strip())
    return tasks


def functions_of(tree, prefix=""):
    """-> {"function" or "Class.method": its node}"""
    found = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            found[prefix + node.name] = node
        elif isinstance(node, ast.ClassDef):
            found |= functions_of(node, f"{prefix}{node.name}.")
    return found


@cache
def find_blanks(text):
    """The blanks of a source, from top to bottom."""
    lines, blanks = text.splitlines(), []
    for name, node in functions_of(ast.parse(text)).items():
        for start in range(node.lineno + 1, node.end_lineno):
            mark = re.fullmatch(r" +# Exercise (\w+)", lines[start - 1])
            if mark:
                rest = [line.strip() for line in lines[start:node.end_lineno]] + [END]
                blanks.append(Blank(mark[1], name, start, start + rest.index(END)))
    return blanks


def with_blanks(text, tasks):
    """A source whose blanks raise NotImplementedError with the task's text."""
    lines = text.splitlines()
    for blank in reversed(find_blanks(text)):
        task, indent = tasks[blank.task], re.match(" *", lines[blank.start - 1])[0]
        head = f"{blank.task} {task.title} ({task.minutes} min)"
        stub = [f'raise NotImplementedError("""{head}']
        stub += [f"    {line}" if line else "" for line in task.text.splitlines()]
        stub[-1] += '""")'
        lines[blank.start:blank.end] = [indent + line if line else "" for line in stub]
    return "\n".join(lines) + "\n"


def write_copy(folder):
    texts = [f"exercises/{path.name}" for path in ROOT.glob("exercises/0*.md")]
    for name in [*COPIED, *texts]:
        (folder / name).parent.mkdir(exist_ok=True)
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name,
                            ignore=shutil.ignore_patterns("__pycache__", "downloads"))
        else:
            shutil.copy(ROOT / name, folder / name)
    tasks = read_tasks()
    for name in SOURCES:
        text = (ROOT / name).read_text(encoding="utf-8")
        (folder / name).write_text(with_blanks(text, tasks), encoding="utf-8")


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", metavar="DIR", type=Path, help="new, or empty")
    options = parser.parse_args(arguments)
    folder = options.folder.resolve()
    if any(folder.is_relative_to(ROOT / name) for name in COPIED):
        parser.error(f"{folder} lies in a folder that is copied: choose one outside")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"cannot make the folder: {error}")
    if any(folder.iterdir()):
        parser.error(f"{folder} is not empty; nothing was written")
    write_copy(folder)
    print(f"wrote {folder}")


if __name__ == "__main__":
    main()
