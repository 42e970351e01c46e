"""Put the repository root on the path, make Hypothesis repeatable, and train one tiny run that the
tests of chapters 5 and 6 share."""
import os
import signal
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or min(2, os.cpu_count() or 1)))

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


def start(script, *options, cwd):
    """The real script in a process of its own, as a user starts it; one thread, as here."""
    assert script < "05" or "--device" in options, "see no_automatic_device"
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    env.update(OMP_NUM_THREADS=str(torch.get_num_threads()), PYTHONWARNINGS="ignore")
    return subprocess.Popen([sys.executable, str(ROOT / script), *map(str, options)], cwd=cwd,
                            env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


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
