"""The table of ways to learn codes is made by chapter 5's own loop, once."""
import re
from importlib import import_module

import pytest
import torch

SCRIPT = "tests.study_tokenizer.py"
ROWS = ["gradient", "EMA + revival", "L2-normalised", "LFQ", "independent scales", "adversarial"]
SMALL = ("--dataset shapes --image-size 16 --scales 1,2,4 --multipliers 1,2 --unshuffle 2 "
         "--vocab-size 16 --latent-dim 4 --channels 8 --groups 4 --tokenizer-batch-size 2 "
         "--tokenizer-steps 5 --held-out 8 --device cpu --precision float32").split()


@pytest.fixture(autouse=True)
def few_shapes(monkeypatch):
    monkeypatch.setattr(import_module("data.shapes"), "DEFAULT_COUNT", {"train": 20, "test": 10})


def test_every_row_is_trained_its_own_way_and_only_once(cli):
    first = cli(SCRIPT, "--rows", *ROWS, *SMALL)
    assert first.status == 0, first.err
    assert first.out.count("tokenizer 5/5 (100%)") == len(ROWS)
    table = [line for line in first.out.splitlines() if line.startswith("| ")]
    assert [line.split(" | ")[0].strip("| ") for line in table[2:]] == ROWS
    assert len({line.split(" | ", 1)[1] for line in table[2:]}) == len(ROWS), "no two rows alike"
    assert all(re.search(r"\| \d+\.\d\d \| \d+% \| \d+ \|( \d+% / \d+ \|){3}$", line)
               for line in table[2:])
    again = cli(SCRIPT, "--rows", *ROWS, *SMALL)
    assert "tokenizer 5/5" not in again.out and table == [
        line for line in again.out.splitlines() if line.startswith("| ")]


def test_l2_normalised_codes_compare_directions_and_stay_on_the_sphere():
    study = import_module("tests.study_tokenizer")
    torch.manual_seed(0)
    quantizer = study.DirectionQuantizer(8, 3).train()
    x = torch.randn(200, 3)
    for _ in range(3):
        _, idx, _ = quantizer(x)
    assert torch.allclose(quantizer.codebook.norm(dim=1), torch.ones(8), atol=1e-5)
    cosine = torch.nn.functional.normalize(x, dim=1) @ quantizer.codebook.t()
    assert torch.equal(quantizer.nearest(x), cosine.argmax(1))
    assert torch.equal(quantizer.nearest(x), quantizer.nearest(7 * x))
