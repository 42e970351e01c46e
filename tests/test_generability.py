"""Tokenizers to generate from: what the decoder is shown changes nothing else."""
import json
from importlib import import_module

import pytest
import torch
from conftest import random_models, stage_of, table

generability = import_module("experiments.generability")


@pytest.mark.slow
def test_generability_trains_a_tokenizer_and_a_transformer_a_row(cli, tmp_path):
    first, again = (cli("experiments.generability.py", "--quick", "--seeds", 1, "--out", "o")
                    for _ in range(2))
    assert first.status == 0, first.err
    head, *found, floor, ranks = table(first.out)
    assert [row[0] for row in found] == list(generability.ROWS)
    assert floor[2] == floor[5] and all(-1 <= float(rank) <= 1 for rank in ranks[1:5])
    for key, paths in (("psnr", "tokenizers/*/0.json"), ("bits", "*/0.json")):
        kept = [json.loads(path.read_text())["found"] for path in
                tmp_path.glob(f"o/generability/shapes-quick/{paths}")]
        kept = [numbers[key] for numbers in kept if key in numbers]
        assert len(set(kept)) == len(kept) == 8, "no two rows are alike"
    assert "3/3" not in again.out and table(again.out) == table(first.out)
    assert (tmp_path / "o/generability/shapes-quick/generability.png").exists()


def test_what_the_decoder_is_shown_changes_nothing_else_and_only_in_training():
    stage, shown = stage_of("tokenizer", learn="ema"), []
    model, image = stage.model.train(), torch.rand(4, 3, 16, 16) * 2 - 1
    model(image)                                           # places the codes
    before = model(image)
    other, decode = torch.randn(4, 4, 4, 4), model.decode
    generability.decoder_sees(lambda *_: other)(stage)
    model.decode = lambda f_hat: shown.append(f_hat) or decode(f_hat)
    after = model(image)
    assert torch.allclose(shown[-1], other, atol=1e-5)
    assert all(map(torch.equal, before[1], after[1]))
    assert torch.equal(before[2]["vq"], after[2]["vq"])
    assert not torch.equal(before[2]["reconstruction"], after[2]["reconstruction"])
    after[2]["reconstruction"].backward()
    assert model.encoder.conv_in.weight.grad.abs().max() > 0, "straight through"
    model.eval()(image)
    assert torch.allclose(shown[-1], model.features(model.image_to_tokens(image)), atol=1e-5)


def test_dropped_maps_and_perturbed_tokens_have_their_shares():
    model, _ = random_models(scales=(1, 2, 4), V=16)
    torch.manual_seed(0)
    tokens = [torch.randint(16, (2000, side * side)) for side in (1, 2, 4)]
    steps = torch.stack(model.pyramid(tokens))
    for share, expected in ((0, [0, 0, 1]), (0.6, [0.2, 0.2, 0.6]), (1, [1 / 3] * 3)):
        found = generability.first_maps(share)(model, tokens)
        is_step = (found == steps).all((2, 3, 4))          # (K, images)
        assert is_step.sum(0).eq(1).all(), "every image is what some of its maps make"
        assert is_step.float().mean(1).tolist() == pytest.approx(expected, abs=0.04)
    model.features = lambda tokens: tokens
    distance = torch.cdist(model.quantizer.codebook, model.quantizer.codebook)
    rank = distance.argsort(1).argsort(1)                  # 0: the code itself
    for before, after in zip(tokens, generability.perturbed(model, tokens)):
        ranks = rank[before, after]
        assert (ranks > 0).float().mean() == pytest.approx(0.1, abs=0.02)
        assert ranks.unique().tolist() == [0, 1, 2, 3], "a fifth of 16 codes"


def test_a_rank_correlation_by_hand():
    assert generability.rank_correlation([1, 2, 30], [10, 20, 5]) == pytest.approx(-0.5)
    assert generability.rank_correlation([3, 1, 2], [9, 4, 8]) == pytest.approx(1)
