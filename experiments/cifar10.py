"""CIFAR-10 from nothing to its table and figures, with one command.

    python experiments/cifar10.py                                         on one GPU
    python experiments/cifar10.py --n 1000 --out out/cifar10-short --tokenizer-steps 3400 \
        --tokenizer-batch-size 16 --steps 1350 --batch-size 16 --views 1 \
        --set held_out=2000 top_p=0

The second command is for a CPU; its training is far too short for good images. Chapter 5 trains
both stages and chapter 6 samples and edits; then the judge of chapter 6 measures the samples at
several strengths of guidance. All options but --n, --cfg and --out go to 05_train.py. The same
command resumes what was stopped; seconds are then those since the resume.
"""
import json
import platform
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from engine import BadInput  # noqa: E402
from engine.devices import pick_device  # noqa: E402
from engine.options import OneLineParser, number, one_line  # noqa: E402


def call(script, *options):
    """Run a chapter and show what it prints. -> (what it printed, seconds)"""
    begin, lines = time.time(), []
    command = [sys.executable, "-u", str(ROOT / script), *map(str, options)]
    print("$", shlex.join(["python", script, *map(str, options)]), flush=True)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    if process.returncode:
        raise BadInput(f"{script} ended with exit status {process.returncode}, see above")
    return "".join(lines), time.time() - begin


def held_out(folder, stage):
    """The last evaluation of a stage. -> dict"""
    entries = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [e["held_out"] for e in entries if e["stage"] == stage and "held_out" in e][-1]


def train(folder, options):
    """Train both stages. -> one line about each"""
    lines = []
    for stage in ("tokenizer", "transformer"):
        out, seconds = call("05_train.py", "--dataset", "cifar10", *options, "--stage", stage,
                            "--out", folder)
        took = re.search(f"{stage}: (steps .* in .*|trained for .*)", out)
        if not took:
            raise BadInput(f"05_train.py trained no {stage}: leave out --dry-run and --help")
        pace = re.findall(r"([\d,.]+) img/s", out)
        lines.append(f"{stage}: {took[1]}; {f'{pace[-1]} pictures/s, ' if pace else ''}"
                     f"{seconds:.0f} s in all")
    return lines


def figures(folder):
    """-> the lines of a table: tokenizer and transformer, scale by scale"""
    settings = json.loads((folder / "settings.json").read_text())
    tokenizer, transformer = held_out(folder, "tokenizer"), held_out(folder, "transformer")
    rows = {"": [f"{side}x{side}" for side in settings["scales"]] + ["all"],
            "codes used": [f"{x:.0%}" for x in
                           [*tokenizer["used"], tokenizer["used_overall"]]],
            "perplexity": [f"{x:.0f}" for x in
                           [*tokenizer["perplexity"], tokenizer["perplexity_overall"]]],
            "PSNR after this scale, dB": [f"{x:.1f}" for x in tokenizer["psnr_after"]]
            + [f"{tokenizer['psnr']:.2f}"],
            "cross-entropy, nats a token (2,000 pictures)":
                [f"{x:.2f}" for x in transformer["per_scale"]] + [f"{transformer['loss']:.3f}"]}
    return table(rows)


def verdict(folder, cfgs, n, options):
    """-> the lines of a table: what the judge measures at each strength of guidance, and of real
    images"""
    rows, notes = {"": ["in class", "Frechet", "precision", "recall"]}, {}
    for cfg in cfgs:
        out, seconds = call("06_sample_and_edit.py", "--run", folder, "--task", "evaluate", "--n",
                            n, "--cfg", cfg, "--out", folder, *options)
        notes["judge"] = re.search("^judge: (.*)", out, re.M)[1]
        notes[f"cfg {cfg:g}"] = re.search("nearest of .*", out)[0]
        for name, numbers in re.findall(r"^(held-out.*?|reconstr\w+|samples, cfg [\d.]+) +"
                                        r"(\d.*)$", out, re.M):
            rows[name.strip()] = numbers.split()
    return [*table(rows), *[f"{what}: {note}" for what, note in notes.items()]]


def table(rows):
    lines = ["| " + " | ".join([name, *numbers]) + " |" for name, numbers in rows.items()]
    return [lines[0], "|" + " --- |" * lines[0].count(" | ") + " --- |", *lines[1:], ""]


def main():
    parser = OneLineParser(
        description=__doc__.splitlines()[0], allow_abbrev=False,
        epilog="All other options go to 05_train.py (see its --help).")
    parser.add_argument("--n", type=number(int, 4), default=10_000,
                        help="samples to judge [10000]")
    parser.add_argument("--cfg", type=number(float, 0), nargs="+",
                        default=[0.0, 1.0, 1.5, 2.0, 3.0], help="guidance [0 1 1.5 2 3]")
    parser.add_argument("--out", type=Path, default=Path("out/cifar10"),
                        help="folder of the run [out/cifar10]")
    parser.add_argument("--data-dir", help="where the data lies, if not in the usual place")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps [auto]")
    ours, rest = parser.parse_known_args()
    passed = ["--device", ours.device]
    if ours.data_dir:
        passed += ["--data-dir", ours.data_dir]
    lines = train(ours.out, [*rest, *passed])
    lines += ["", *figures(ours.out), *verdict(ours.out, ours.cfg, ours.n, passed)]
    device = pick_device(ours.device)
    where = torch.cuda.get_device_name() if device.type == "cuda" else (
        f"{torch.get_num_threads()} threads, {platform.processor() or platform.machine()}")
    print(f"\ntorch {torch.__version__}, {where}, {time.strftime('%Y-%m-%d')}\n")
    print("\n".join(lines))


if __name__ == "__main__":
    one_line(main)
