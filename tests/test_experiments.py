"""The experiments: every script runs, and the mechanisms that only they have do what they say."""
import subprocess
import sys
from importlib import import_module

import pytest
import torch
from conftest import ROOT, random_models, seeded

trial = import_module("experiments.trial")
m2, m3, m4 = (import_module(name) for name in (
    "02_multiscale_vqvae", "03_block_causal_mask", "04_var_transformer"))
drawing = import_module("06_sample_and_edit")
SCRIPTS = sorted(path.stem for path in (ROOT / "experiments").glob("*.py") if path.stem != "trial")


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_prints_its_table_and_resumes(name, tmp_path):
    """--quick needs no data. A second run finds what the first one kept and trains nothing."""
    script = [sys.executable, str(ROOT / "experiments" / f"{name}.py"), "--quick"]
    tables = []
    for _ in range(2):
        done = subprocess.run(script, cwd=tmp_path, text=True, capture_output=True)
        assert done.returncode == 0, done.stderr
        tables.append([line for line in done.stdout.splitlines() if line.startswith("| ")])
    assert len(tables[0]) > 3 and len({line.count("|") for line in tables[0]}) <= 2
    if (tmp_path / "out" / "experiments").exists():
        assert tables[0] == tables[1] and "3/3 (100%)" not in done.stdout


def test_a_wrong_option_is_one_line(tmp_path):
    done = subprocess.run([sys.executable, str(ROOT / "experiments" / "ablation.py"), "--n", "3"],
                          cwd=tmp_path, text=True, capture_output=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "--n" in done.stderr


def test_cells_are_means_and_half_ranges():
    found = [dict(a=1.52, b=10.0), dict(a=1.60, b=30.0)]
    assert trial.cells(found, dict(b=0, a=2)) == ["20 ± 10", "1.56 ± 0.04"]
    assert trial.cells(found[:1], dict(a=1)) == ["1.5"]


@pytest.mark.parametrize("order, scales, by_map", [
    ("one_by_one", (4,), False), ("coarse_to_fine", (8,), False), ("one_by_one", (1, 2, 4), True),
    ("halves", (1, 2, 3, 4), True), ("cell_by_cell", (4, 4), False)])
@torch.no_grad()
def test_tokens_in_another_order_are_the_same_image_and_no_step_sees_itself(order, scales, by_map):
    experiment = import_module("experiments.order")
    torch.manual_seed(0)
    tokenizer = m2.MultiScaleVQVAE(m2.TokenizerConfig(
        image_size=4 * scales[-1], scales=scales, vocab_size=16, latent_dim=4, channels=8,
        groups=4)).eval()
    other = experiment.Reordered(tokenizer, getattr(experiment, order)(scales), by_map)
    var = experiment.StepwiseVAR(m4.VARConfig(
        num_classes=2, scales=other.scales, vocab_size=16, latent_dim=8, depth=2, width=16,
        heads=2), other.sizes).eval()
    for p in var.parameters():
        p.add_(0.3 * torch.randn_like(p))
    image, labels = torch.rand(2, 3, *[4 * scales[-1]] * 2) * 2 - 1, torch.tensor([0, 2])
    tokens = other.image_to_tokens(image)
    assert torch.equal(other.features(tokens), tokenizer.features(tokenizer.image_to_tokens(image)))
    assert sorted(other.order.tolist()) == list(range(var.L))
    logits = var(labels, other.teacher_inputs(tokens))                 # (2, L, V)
    conditioning, cache, drawn, inputs = var.conditioning(labels), var.new_cache(), 0, None
    for k, part in enumerate(logits.split(other.sizes, 1)):
        assert torch.allclose(var.step(k, inputs, conditioning, cache), part, atol=1e-5)
        drawn, inputs = other.next_input(k, drawn, tokens[k])
    step = torch.repeat_interleave(torch.arange(other.K), torch.tensor(other.sizes))
    for k in range(0, other.K, 3):
        changed = [part + 1 if i == k else part for i, part in enumerate(tokens)]
        changed = [part % 16 for part in changed]
        moved = (var(labels, other.teacher_inputs(changed)) - logits).abs().amax((0, 2))
        assert moved[step <= k].max() == 0 and (k == other.K - 1 or moved[step > k].max() > 1e-3)


def test_a_class_token_reaches_later_tokens_by_attention_alone():
    """Where its row is the same for all, the class changes nothing; with AdaLN it still would."""
    ablation, labels = import_module("experiments.ablation"), torch.tensor([0, 1])
    config = m4.VARConfig(scales=(1,) * 4, vocab_size=8, latent_dim=4, depth=2, width=16, heads=2,
                          shared_adaln=True, num_classes=3)
    inputs, moved = torch.randn(1, 3, 4, generator=seeded()).expand(2, -1, -1), []
    for kind in (ablation.ClassToken, m4.VAR):
        torch.manual_seed(0)
        var = kind(config).eval()
        for p in var.parameters():
            p.data.add_(0.3 * torch.randn_like(p))
        given = var.conditioning(labels)
        for told in (given, given._replace(row=given.row[:1].expand(2, -1, -1))):
            var.conditioning = lambda labels, told=told: told
            logits = var(labels, inputs)
            moved.append(float((logits[0] - logits[1]).detach().abs().max()))
    assert moved[0] > 1e-3 and moved[1] == 0 and moved[3] > 1e-3


def test_a_markov_map_attends_to_itself_alone():
    """In one pass under its mask as in sampling, scale by scale and without a cache."""
    scales = import_module("experiments.scales")
    tokenizer, var = random_models()
    markov = scales.MarkovVAR(var.config).eval()
    markov.load_state_dict(var.state_dict())
    labels, inputs = torch.tensor([0, 2]), torch.randn(2, var.L - 1, 4, generator=seeded())
    with torch.no_grad():
        found, causal = markov(labels, inputs), var(labels, inputs)
        conditioning, parts = markov.conditioning(labels), [None, *inputs.split([4, 16], 1)]
        alone = [markov.step(k, parts[k], conditioning, markov.new_cache()) for k in range(3)]
        again = drawing.sample_tokens(tokenizer, markov, labels, cfg=2.0, generator=seeded())
    scale = m3.scale_of_token(var.config.scales)
    assert torch.equal(markov.mask, scale[:, None] == scale[None, :])
    assert torch.allclose(torch.cat(alone, 1), found, atol=1e-5)
    assert (found - causal)[:, 1:].abs().amax(2).min() > 1e-3, "only the first map is as before"
    assert [tokens.shape[1] for tokens in again] == [1, 4, 16]


def bit_models(bits, scales=(1, 2)):
    """A tokenizer of bits and a bitwise transformer, with random weights and open gates."""
    infinity = import_module("experiments.infinity")
    torch.manual_seed(0)
    tokenizer = m2.MultiScaleVQVAE(m2.TokenizerConfig(
        image_size=scales[-1] * 4, scales=scales, channels=8, groups=4, quantizer="bits",
        vocab_size=2, latent_dim=bits)).eval().requires_grad_(False)
    var = infinity.BitwiseVAR(m4.VARConfig(
        num_classes=2, scales=scales, vocab_size=2, latent_dim=bits, depth=2, width=16, heads=2))
    for p in var.requires_grad_(False).parameters():
        p.add_(0.3 * torch.randn_like(p))
    return infinity, tokenizer, var.eval()


def test_the_loss_of_bits_is_what_a_slow_loop_finds_and_a_likelihood():
    """The probabilities of all 2^10 images of five vectors with two bits each sum to 1."""
    infinity, tokenizer, var = bit_models(2)
    bits = torch.arange(2 ** 10)[:, None] >> torch.arange(10) & 1      # (1024, 10)
    maps, classes = list(bits.split([2, 8], 1)), torch.ones(2 ** 10, dtype=torch.long)
    inputs = tokenizer.teacher_inputs(maps)
    losses, logits = infinity.bit_losses(var, classes, inputs, bits), var(classes, inputs)
    for i in (3, 77, 1000):
        for n in range(10):
            chances = logits[i, n].double().exp()                      # of 0 and of 1
            right = chances[bits[i, n]] / chances.sum()
            assert float(losses[i, n]) == pytest.approx(-float(right.log()), rel=1e-4)
    p = drawing.log_likelihood(tokenizer, var, maps, classes).sum(1)
    assert torch.allclose(-losses.sum(1), p, atol=1e-4)
    assert float(p.exp().sum()) == pytest.approx(1, abs=1e-4) and p.std() > 0.1


def test_labels_are_the_bits_before_their_flip_and_inputs_those_after():
    infinity, tokenizer, _ = bit_models(6, (1, 2, 4))
    f = torch.randn(8, 6, 4, 4, generator=seeded())
    clean = tokenizer.quantize(f)
    labels, inputs = infinity.flipped_rounds(tokenizer, f, torch.zeros(8, 3))
    assert torch.equal(labels, torch.cat(clean, 1))
    assert torch.equal(inputs, tokenizer.teacher_inputs(clean))
    labels, inputs = infinity.flipped_rounds(tokenizer, f, torch.tensor([[1.0, 0, 0]] * 8))
    first, *finer = labels.split([6, 24, 96], 1)
    assert torch.equal(first, clean[0]) and not torch.equal(finer[0], clean[1])
    assert torch.equal(inputs, tokenizer.teacher_inputs([1 - first, *finer]))
