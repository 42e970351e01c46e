"""Put the repository root on the path, make Hypothesis repeatable, and train one tiny run that the
tests of chapters 5 and 6 share."""
import contextlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from functools import partial
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
# The models are tiny: two threads would mostly wait for each other.
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))

# The same examples on every run: a red test must be red for everybody.
settings.register_profile("repeatable", deadline=None, derandomize=True, max_examples=25,
                          suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("repeatable")

# Both stages in a second: 16 px, 1 + 4 + 16 = 21 tokens, 16 codes.
TINY = ("--image-size 16 --set scales=1,2,4 multipliers=1,2 unshuffle=2 --vocab-size 16 "
        "--set latent_dim=4 channels=8 groups=4 width=16 heads=2 --depth 2 --views 2 "
        "--workers 0 --tokenizer-batch-size 4 --batch-size 4 --tokenizer-steps 24 --steps 24 "
        "--save-every 5 --log-every 1 --device cpu --precision float32").split()


def same(a, b):
    """Equal to the last bit, through dicts, lists and tensors."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


@pytest.fixture(scope="session", autouse=True)
def no_automatic_device():
    """A test says which device it means: on a machine with a GPU "auto" is another one than here,
    and what is compared may lie elsewhere. One that is about "auto" replaces best_device itself."""
    from engine import devices
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(devices, "best_device", lambda: pytest.fail("a test leaves the device open"))
        yield


def stage_of(kind, learn="gradient", **settings):
    """A stage of chapter 5 with the tiny sizes, on noise, in this process and without a folder."""
    from engine.processes import Processes
    m2, m4 = import_module("02_multiscale_vqvae"), import_module("04_var_transformer")
    m5, processes = import_module("05_train"), Processes("cpu")
    torch.manual_seed(0)
    settings = m5.Settings(**{"precision": "float32", **settings})
    sizes = dict(scales=(1, 2, 4), vocab_size=16, latent_dim=4)
    config = m2.TokenizerConfig(**sizes, image_size=16, channels=8, groups=4, unshuffle=2,
                                multipliers=(1, 2), learn=learn)
    images = np.random.default_rng(0).integers(0, 255, (32, 16, 16, 3), dtype=np.uint8)
    if kind == "tokenizer":
        return m5.TokenizerStage(settings, processes, None, config, images, images, ["noise"])
    tokenizer = m2.MultiScaleVQVAE(config).eval().requires_grad_(False)
    config = m4.VARConfig(**sizes, num_classes=3, depth=3, width=16, heads=2, drop_path=0.5)
    data = np.random.default_rng(0).integers(0, 16, (1, 32, 21)), np.arange(32) % 3
    return m5.TransformerStage(settings, processes, tokenizer, config,
                               dict(train=data, test=data), "abc")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def random_models(scales=(1, 2, 4), V=16, noise=0.3, multipliers=(1, 2), **options):
    """A tokenizer and a transformer with random weights; the gates are open, so that everything
    has an effect. options: of VARConfig"""
    m2, m4 = import_module("02_multiscale_vqvae"), import_module("04_var_transformer")
    torch.manual_seed(0)
    sizes = dict(scales=scales, vocab_size=V, latent_dim=4)
    tokenizer = m2.MultiScaleVQVAE(m2.TokenizerConfig(
        **sizes, image_size=scales[-1] * 2 ** len(multipliers), channels=8,
        multipliers=multipliers, unshuffle=2, groups=4))
    var = m4.VAR(m4.VARConfig(**sizes, num_classes=3, depth=2, width=16, heads=2, **options))
    with torch.no_grad():
        for p in var.parameters():
            p.add_(noise * torch.randn_like(p))
    return tokenizer.eval().requires_grad_(False), var.eval().requires_grad_(False)


def scale_by_scale(var, labels, teacher_inputs):
    """Logits of all scales from `step`, as sampling calls it. The cache is then full."""
    conditioning, cache, logits, begin = var.conditioning(labels), var.new_cache(), [], 0
    for k, side in enumerate(var.config.scales):
        inputs = teacher_inputs[:, begin:begin + side * side] if k else None
        begin += side * side if k else 0
        logits.append(var.step(k, inputs, conditioning, cache))
    with pytest.raises(AssertionError, match="cache"):
        var.step(0, None, conditioning, cache)
    return torch.cat(logits, 1)


def printed(call, *args):
    """What a function prints, where capsys cannot be used: in tests with many examples."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        call(*args)
    return out.getvalue()


def without_images(run, folder):
    """Copy a run into a folder, as if its data set were not on this machine. -> the folder"""
    for name in ("tokenizer.pt", "transformer.pt"):
        state = torch.load(run / name, weights_only=True)
        torch.save({**state, "dataset": str(folder / "gone")}, folder / name)
    return folder


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def is_the_same_run(a, b):
    """Every bit: weights, optimizers, steps, settings, what was logged, the tokens."""
    from engine.checkpoints import load_checkpoint
    for name in ("tokenizer.pt", "transformer.pt"):
        assert same(load_checkpoint(a / name), load_checkpoint(b / name))
    for name in ("log.jsonl", "tokens_train.npy", "tokens_train.json", "tokens_test.npy",
                 "tokens_test.json"):
        assert (a / name).read_bytes() == (b / name).read_bytes(), name
    assert not list(a.glob("*.tmp")), "half a file was left behind"
    return True


def start(*words, cwd):
    """Python with these words, scripts below the root, in a process group of its own; one thread,
    as here."""
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    env.update(OMP_NUM_THREADS=str(torch.get_num_threads()), PYTHONWARNINGS="ignore")
    words = [str(ROOT / word) if str(word).endswith(".py") else str(word) for word in words]
    return subprocess.Popen([sys.executable, *words], cwd=cwd, env=env, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)


@pytest.fixture
def under_fire(monkeypatch, tmp_path):
    """under_fire(mishap, *options): 05_train.py in a process of its own, with that mishap (see
    under_fire.py). -> .status .out .err"""
    def call(mishap, *options):
        monkeypatch.setenv("MISHAP", mishap)
        process = start("tests/under_fire.py", *options, cwd=tmp_path)
        out, err = process.communicate(timeout=300)
        return SimpleNamespace(status=process.returncode, out=out, err=err)
    return call


@pytest.fixture(scope="session")
def picture_folder(tmp_path_factory):
    """60 small pictures in the class folders ant, bee and cat."""
    from PIL import Image

    from data import shapes
    root = tmp_path_factory.mktemp("data") / "insects"
    images, labels = shapes.draw(range(60), size=18)
    for i, (image, label) in enumerate(zip(images, labels)):
        path = root / ("ant", "bee", "cat")[label % 3] / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return root


@pytest.fixture(scope="session")
def tiny(picture_folder, tmp_path_factory):
    """A run of the real 05_train.py: .folder, .options (without --out), .start(script, *options),
    .stdout."""
    work = tmp_path_factory.mktemp("work")
    options = ["--dataset", str(picture_folder), *TINY]
    process = start("05_train.py", *options, "--out", work / "run", cwd=work)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return SimpleNamespace(folder=work / "run", options=options, start=start, stdout=out,
                           stderr=err, pictures=picture_folder)


# Stage 2 without what differs between processes (see README): noise of each, and Muon's rounding.
PLAIN = ("--stage transformer --set label_dropout=0 drop_path=0 --optimizer adamw --steps 14 "
         "--save-every 4").split()


def with_tokens(tiny, folder):
    """A folder that has the tiny run's tokenizer and its tokens. -> .folder .options"""
    folder.mkdir()
    for name in ("tokenizer.pt", *(f"tokens_{split}.{end}" for split in ("train", "test")
                                   for end in ("npy", "json"))):
        shutil.copy(tiny.folder / name, folder)
    return SimpleNamespace(folder=folder, options=[*tiny.options, *PLAIN, "--out", folder])


@pytest.fixture
def stage_2(tiny, tmp_path):
    return with_tokens(tiny, tmp_path / "run")


@pytest.fixture(scope="session")
def alone(tiny, tmp_path_factory):
    """That run by one process: .folder, and .agrees(folder) of another."""
    run = with_tokens(tiny, tmp_path_factory.mktemp("alone") / "run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MISHAP", "")
        process = start("tests/under_fire.py", *run.options, cwd=run.folder)
        assert process.communicate(timeout=300)[1] == "" and process.returncode == 0
    return SimpleNamespace(folder=run.folder, agrees=partial(agrees, run.folder))


def agrees(alone, folder):
    """What was logged, and the weights: they differ by little of what training changed."""
    m4, m5 = import_module("04_var_transformer"), import_module("05_train")
    one, two = log_of(alone), log_of(folder)
    assert [e["step"] for e in one] == [e["step"] for e in two] and len(one) == 14 + 4
    for x, y in zip(one, two):
        assert x.keys() == y.keys()
        x, y = x.get("held_out", x), y.get("held_out", y)
        for key in {"loss", "per_scale", "right", "grad"} & x.keys():
            assert x[key] == pytest.approx(y[key], rel=2e-4, abs=1e-5), (key, x, y)
    (model, about), (other, _) = (m5.load_transformer(f / "transformer.pt")
                                  for f in (folder, alone))
    torch.manual_seed(0)
    begin = m4.VAR(model.config).state_dict()
    for name, weight in other.state_dict().items():
        moved = (weight - begin[name]).norm()
        assert (model.state_dict()[name] - weight).norm() < 0.01 * moved + 1e-5, name
    assert moved > 0 and about["step"] == 14 and not list(folder.glob("*.tmp"))
    return True


@pytest.fixture
def cli(monkeypatch, capsys, tmp_path):
    """cli(script, *options) runs a script's main() here, in an empty folder, as if it had been
    started: -> .status .out .err, and .started, the commands it would have started itself."""
    from engine.options import one_line
    handlers = {name: signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.chdir(tmp_path)

    def call(script, *options):
        started, module = [], import_module(script.removesuffix(".py"))
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", [script, *map(str, options)])
            patch.setattr(subprocess, "call", lambda command, **_: started.append(command) or 0)
            capsys.readouterr()
            with pytest.raises(SystemExit) as stop:
                one_line(module.main)
        out, err = capsys.readouterr()
        return SimpleNamespace(status=stop.value.code or 0, out=out, err=err, started=started)
    yield call
    for name, handler in handlers.items():
        signal.signal(name, handler)


@pytest.fixture
def refused(cli):
    """refused(script, *options): exit status 2, one line on stderr, no traceback. -> the line"""
    def call(script, *options):
        result = cli(script, *options)
        assert result.status == 2, (options, result)
        assert result.err.count("\n") == 1 and result.err.startswith(script), result.err
        assert "Traceback" not in result.err
        return result.err
    return call


def table(text):
    """Cells of the rows of a table, without the line under its head."""
    lines = [line.strip("| ").split("|") for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line] for line in lines if set(line[1].strip()) != {"-"}]


def quick_table(cli, script):
    """The first table that an experiment prints with --quick. -> its head, its rows"""
    result = cli(script, "--quick")
    assert result.status == 0, result.err
    first = re.search(r"(^\|.*\|\n)+", result.out, re.M)[0].splitlines()
    head, _, *found = [[cell.strip() for cell in line[1:-1].split("|")] for line in first]
    assert all(len(row) == len(head) for row in found)
    assert "wrote " in result.out
    return head, found
