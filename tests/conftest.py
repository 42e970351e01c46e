"""What several test files share: a tiny run of the real script, ways to call a script,
models with random weights, and examples that Hypothesis repeats."""
import json
import os
import signal
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
# The models are tiny: two threads would mostly wait for each other.
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))

# The same examples in every run: a failure must be a failure for everybody.
settings.register_profile("repeatable", deadline=None, derandomize=True, max_examples=25,
                          suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("repeatable")

# Both stages in a second: 16 px, 1 + 4 + 16 = 21 tokens, 16 codes.
TINY = ("--image-size 16 --scales 1,2,4 --multipliers 1,2 --unshuffle 2 --vocab-size 16 "
        "--latent-dim 4 --channels 8 --groups 4 --width 16 --heads 2 --depth 2 --views 2 "
        "--tokenizer-batch-size 4 --batch-size 4 --tokenizer-steps 24 --steps 24 "
        "--workers 0 --save-every 5 --log-every 1 --device cpu --precision float32").split()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A run of the real 05_train.py -> .folder, its .options without --out, its .stderr
    and the .pictures: 60 in the folders ant, bee and cat, of which three are held out"""
    from PIL import Image

    from data import shapes
    work = tmp_path_factory.mktemp("work")
    images, labels = shapes.draw(range(60), size=18)
    for i, (image, label) in enumerate(zip(images, labels)):
        path = work / "insects" / ("ant", "bee", "cat")[label % 3] / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    options = ["--dataset", str(work / "insects"), *TINY]
    process = start("05_train.py", *options, "--out", work / "run", cwd=work)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return SimpleNamespace(folder=work / "run", options=options, stderr=err,
                           pictures=work / "insects")


def start(*words, cwd):
    """Start Python in a process group of its own. Scripts lie below the root."""
    env = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads()),
                        "PYTHONWARNINGS": "ignore"}
    words = [str(ROOT / word) if str(word).endswith(".py") else str(word) for word in words]
    return subprocess.Popen([sys.executable, *words], cwd=cwd, env=env, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            start_new_session=True)


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def same(a, b):
    """Equal to the last bit, through dicts, lists and tensors."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


@pytest.fixture
def cli(monkeypatch, capsys, tmp_path):
    """cli(script, *options) runs a script's main() here, in an empty folder
    -> .status .out .err, and .started, the commands it would have started itself"""
    from engine import distributed
    from engine.options import run_main
    numbers = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
    handlers = {number: signal.getsignal(number) for number in numbers}
    monkeypatch.chdir(tmp_path)

    def call(script, *options):
        started, module = [], import_module(script.removesuffix(".py"))
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", [script, *map(str, options)])
            patch.setattr(subprocess, "call", lambda command: started.append(command))
            patch.setattr(distributed, "_signals", [])
            capsys.readouterr()
            with pytest.raises(SystemExit) as stop:
                run_main(module.main)
        out, err = capsys.readouterr()
        status = stop.value.code or 0
        return SimpleNamespace(status=status, out=out, err=err, started=started)
    yield call
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def refused(cli):
    """refused(script, *options): exit status 2 and one line on stderr -> the line"""
    def call(script, *options):
        result = cli(script, *options)
        assert result.status == 2 and result.err.count("\n") == 1, (options, result)
        assert result.err.startswith(script)
        return result.err
    return call


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def random_models(scales=(1, 2, 4), residual=True):
    """A tokenizer and a transformer with random weights. The gates are open, so that
    everything has an effect."""
    m2, m4 = import_module("02_multiscale_vqvae"), import_module("04_var_transformer")
    torch.manual_seed(0)
    sizes = dict(scales=scales, vocab_size=16, latent_dim=4)
    tokenizer = m2.MultiScaleVQVAE(m2.TokenizerConfig(
        **sizes, image_size=4 * scales[-1], channels=8, multipliers=(1, 2), unshuffle=2,
        groups=4, residual=residual))
    var = m4.VAR(m4.VARConfig(**sizes, num_classes=3, depth=2, width=16, heads=2))
    with torch.no_grad():
        for p in var.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return tokenizer.eval().requires_grad_(False), var.eval().requires_grad_(False)


def layout():
    """Random state dicts in the released layout, and the scales they were made for."""
    torch.manual_seed(0)
    stored = json.loads((ROOT / "tests" / "golden" / "tiny_keys.json").read_text())["plain"]
    vae, var = ({name: 0.1 * torch.randn(shape) for name, shape in stored[part].items()}
                for part in ("vae", "var"))
    return vae, var, stored["config"]["patch_nums"]
