"""How many scales: rows share what they should, and a Markov map sees itself alone."""
import json
from importlib import import_module

import pytest
import torch
from conftest import random_models, seeded, table

masking = import_module("03_block_causal_mask")


@pytest.mark.slow
def test_scales_share_a_tokenizer_where_only_attention_differs(cli, tmp_path):
    first, again = (cli("experiments.scales.py", "--quick", "--seeds", 1) for _ in range(2))
    head, *found = table(first.out)
    assert first.status == 0, first.err
    *found, floor = [dict(zip(head, row)) for row in found]
    assert [row["tokens"] for row in found] == "64 65 81 85 130 130 130".split()
    assert len({row["PSNR, dB"] for row in found}) == 6, "a tokenizer each, but for Markov"
    assert found[4]["PSNR, dB"] == found[6]["PSNR, dB"]
    kept = [json.loads(path.read_text())["found"]["bits"] for path in
            tmp_path.glob("out/experiments/scales/shapes-quick/K*/0.json")]
    assert len(set(kept)) == len(kept) == 7
    assert floor["scales"] == "held-out images" and "3/3" not in again.out
    assert table(again.out) == table(first.out), "nothing is trained or judged again"
    assert (tmp_path / "out/experiments/scales/shapes-quick/scales.png").exists()


def test_a_markov_map_attends_to_itself_alone(monkeypatch):
    """Like chapter 4's transformer under a dense block-diagonal mask, and like its own sampling."""
    scales = import_module("experiments.scales")
    tokenizer, var = random_models(label_dropout=1.0, drop_path=0.0)
    markov = scales.MarkovVAR(var.config).eval()
    markov.load_state_dict(var.state_dict())
    labels, inputs = torch.tensor([0, 2]), torch.randn(2, var.L - 1, 4, generator=seeded())
    found, causal = markov(labels, inputs), var(labels, inputs)
    scale = masking.scale_of_token(var.config.scales)
    same = scale[:, None] == scale[None, :]
    monkeypatch.setattr(masking, "block_causal_attention", lambda q, k, v, scales, mask, factor:
                        masking.attention(q, k, v, same, factor))
    assert torch.allclose(found, var(labels, inputs), atol=1e-5)
    assert (found - causal)[:, 1:].abs().amax(2).min() > 1e-3, "only the first map is as before"
    cache, conditioning = markov.new_cache(), markov.conditioning(labels)
    parts = [None, *inputs.split([4, 16], 1)]
    drawn = [markov.step(k, parts[k], conditioning, cache) for k in range(3)]
    assert torch.allclose(torch.cat(drawn, 1), found, atol=1e-5)
    assert len(import_module("06_sample_and_edit").sample_tokens(
        tokenizer, markov, labels, cfg=[0, 2, 0])) == 3, "guided up to the second map"
    # Labels are hidden in training, here all of them, and never otherwise.
    assert torch.allclose(markov.train()(labels, inputs), var(torch.tensor([3, 3]), inputs),
                          atol=1e-5)
