"""The dry run: counted by hand, and nothing else happens."""
import re
from importlib import import_module

import pytest
import torch
from conftest import TINY
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import plan

m2, m4 = import_module("02_multiscale_vqvae"), import_module("04_var_transformer")
m5 = import_module("05_train")
SCRIPT = "05_train.py"


def test_a_dry_run_prints_the_sizes_and_touches_nothing(cli, tmp_path, monkeypatch):
    def touch(*_, **__):
        raise AssertionError("a dry run")
    for name in ("load_data", "train", "relaunch"):
        monkeypatch.setattr(m5, name, touch)
    result = cli(SCRIPT, *TINY, "--dataset", "/no/such/folder", "--out", tmp_path / "run",
                 "--gpus", 2, "--dry-run")
    assert (result.status, result.err, result.started) == (0, "", [])
    assert not list(tmp_path.iterdir()) and max(map(len, result.out.splitlines())) <= 100
    _, config, var = m5.read_settings(TINY)
    for name, model in (("tokenizer", m2.MultiScaleVQVAE(config)),
                        ("transformer", m4.VAR(m5.var_sizes(var, config, 10)))):
        count = sum(p.numel() for p in model.parameters())
        row = re.search(rf"^{name} +([\d.]+) M +4 +24(?: +[\d.]+) +([\d.]+) +([\d.]+) +[\d.]+$",
                        result.out, re.M)
        millions, weights, gradients = map(float, row.groups())
        assert millions == pytest.approx(count / 1e6, abs=0.051)
        assert weights == gradients == pytest.approx(4 * count / 1e9, abs=6e-4)
    assert "is 21 tokens" in result.out
    assert "2 views, 0.084 MB for every 1,000" in result.out, "2 views of 21 tokens, 2 bytes each"


@pytest.mark.slow
def test_the_largest_models_have_a_plan(cli):
    out = cli(SCRIPT, "--dataset", "imagenet", "--depth", 36, "--batch-size", 64, "--dry-run").out
    assert "512 x 512 is 2240 tokens" in out and "350 epochs" in out and "2,35" in out


@settings(max_examples=4)
@given(scales=st.sampled_from([(1,), (1, 2), (2, 3, 5), (1, 2, 3, 4, 6, 8)]),
       depth=st.integers(1, 3), heads=st.integers(1, 3), V=st.integers(2, 50))
def test_a_transformers_arithmetic_is_six_products_per_weight_and_token(scales, depth, heads, V):
    """Two forwards, four backwards; AdaLN once per image; attention of each token over the tokens
    of its own and all coarser maps, or over all of them under a mask."""
    D, C = 32 * heads, 8
    with torch.device("meta"):
        model = m4.VAR(m4.VARConfig(num_classes=5, scales=scales, vocab_size=V, latent_dim=C,
                                    depth=depth, width=D, heads=heads))
        labels, inputs = torch.zeros(1, dtype=torch.long), torch.zeros(1, model.L - model.first, C)
    sizes = [side * side for side in scales]
    L = sum(sizes)
    weights = depth * 12 * D * D + D * V                   # qkv 3, proj 1, MLP 4 + 4
    once = depth * 6 * D * D + 2 * D * D
    pairs = sum(n * sum(sizes[:k + 1]) for k, n in enumerate(sizes)), L * L
    words = (L - sizes[0]) * C * D                         # its input is data: no gradient
    low, high = (6 * (L * weights + once + 2 * p * D * depth) + 4 * words for p in pairs)
    counted = plan.flops(lambda: model(labels, inputs))
    assert 0.99 * low <= counted <= 1.01 * high
