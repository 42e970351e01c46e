"""Guidance by scale: which scales are guided, and what they cost."""
import json
from importlib import import_module

import pytest
import torch
from conftest import random_models, table


@pytest.mark.slow
def test_rows_of_guidance_differ_in_samples_and_cost_and_are_drawn_once(cli, tmp_path):
    first, again = (cli("experiments.guidance.py", "--quick", "--cfg", "1.5") for _ in range(2))
    assert first.status == 0, first.err
    head, *rows = table(first.out)
    names = [row[0] for row in rows]
    off = [f"off from {side}x{side}" for side in (8, 6, 4, 3, 2)]
    assert names == ["none", "ramp 1.5", *(f"ramp 1.5, {x}" for x in off[:4]), "constant 1.5",
                     *(f"constant 1.5, {x}" for x in off),
                     *(f"constant 1.5, {x.replace('off', 'on')}" for x in off[::-1]),
                     "constant 0.75", "held-out images", "their reconstructions"]
    tokens = [row[1] for row in rows[:-2]]
    assert tokens == "130 260 196 160 144 135 260 196 160 144 135 131".split() + ["260"] * 6
    folder = tmp_path / "out/experiments/guidance/shapes-quick"
    frechet = [json.loads((folder / name / "0.json").read_text())["found"]["frechet"]
               for name in ("none", "ramp 1.5", "constant 1.5", "constant 1.5, off from 8x8",
                            "constant 1.5, on from 8x8")]
    assert len(set(frechet)) == 5, "the same noise, but other strengths"
    assert table(again.out) == table(first.out) and (folder / "guidance.png").exists()


def test_guidance_by_hand_and_the_tokens_that_the_transformer_sees():
    guidance = import_module("experiments.guidance")
    curves = guidance.schedules([1, 4], (1, 2, 4))
    assert curves == {
        "ramp 1": {"ramp 1": [0, 0.5, 1], "ramp 1, off from 4x4": [0, 0.5, 0]},
        "constant 1": {"constant 1": [1, 1, 1], "constant 1, off from 4x4": [1, 1, 0],
                       "constant 1, off from 2x2": [1, 0, 0]},
        "ramp 4": {"ramp 4": [0, 2, 4], "ramp 4, off from 4x4": [0, 2, 0]},
        "constant 4": {"constant 4": [4, 4, 4], "constant 4, off from 4x4": [4, 4, 0],
                       "constant 4, off from 2x2": [4, 0, 0]},
        "others": {"constant 4, on from 2x2": [0, 4, 4], "constant 4, on from 4x4": [0, 0, 4],
                   "constant 2": [2, 2, 2]}}
    assert guidance.schedules([2, 4], (1, 2, 4))["others"].keys() == {
        "constant 4, on from 2x2", "constant 4, on from 4x4"}, "constant 2 has a curve"
    tokenizer, var = random_models()
    seen = []
    var.head.register_forward_hook(lambda layer, given, logits: seen.append(logits[..., 0].numel()))
    for t in [[0, 0, 0], *(t for rows in curves.values() for t in rows.values())]:
        seen.clear()
        guidance.drawing.sample_tokens(tokenizer, var, torch.tensor([2, 0, 1]), cfg=t)
        assert sum(seen) == 3 * guidance.tokens_computed(t, tokenizer.scales)
