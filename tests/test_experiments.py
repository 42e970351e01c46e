"""The experiments: every script runs, and the parts that only they have are right."""
import subprocess
import sys
from importlib import import_module

import pytest
import torch
from conftest import ROOT, random_models, seeded

sys.path.insert(0, str(ROOT / "experiments"))    # as when Python runs one of the scripts

m2, m4 = import_module("02_multiscale_vqvae"), import_module("04_var_transformer")
drawing = import_module("06_sample_and_edit")
SCRIPTS = {path.stem for path in (ROOT / "experiments").glob("*.py")} - {"trial"}


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(SCRIPTS))
def test_every_script_prints_its_table_and_resumes(name, tmp_path):
    """--quick needs no data. A second run finds the results of the first."""
    script = [sys.executable, str(ROOT / "experiments" / f"{name}.py"), "--quick"]
    tables = []
    for _ in range(2):
        done = subprocess.run(script, cwd=tmp_path, text=True, capture_output=True)
        assert done.returncode == 0, done.stderr
        tables.append([line for line in done.stdout.splitlines() if line.startswith("| ")])
    assert len(tables[0]) > 3 and len({line.count("|") for line in tables[0]}) <= 2
    if (tmp_path / "out" / "experiments").exists():
        assert tables[0] == tables[1] and "3/3 (100%)" not in done.stdout


def test_a_wrong_option_is_one_line(refused):
    assert "--n" in refused("experiments.ablation", "--n", 3)


def opened(model, noise=0.3):
    """The model in eval mode, its gates opened, so that everything has an effect."""
    for p in model.eval().requires_grad_(False).parameters():
        p.add_(noise * torch.randn_like(p))
    return model


@pytest.mark.parametrize("order, scales, by_map", [
    ("one_by_one", (4,), False), ("coarse_to_fine", (8,), False),
    ("halves", (1, 2, 3, 4), True), ("cell_by_cell", (4, 4), False)])
def test_tokens_in_another_order_are_the_same_image_and_no_step_sees_itself(
        order, scales, by_map):
    experiment = import_module("experiments.order")
    tokenizer, _ = random_models(scales)
    other = experiment.Reordered(tokenizer, getattr(experiment, order)(scales), by_map)
    var = opened(experiment.StepwiseVAR(m4.VARConfig(
        num_classes=2, scales=other.scales, vocab_size=16, latent_dim=8, depth=2, width=16,
        heads=2), other.sizes))
    side, labels = tokenizer.config.image_size, torch.tensor([0, 2])
    image = torch.rand(2, 3, side, side, generator=seeded()) * 2 - 1
    tokens, wanted = other.image_to_tokens(image), tokenizer.image_to_tokens(image)
    assert torch.equal(other.features(tokens), tokenizer.features(wanted))
    assert sorted(other.order.tolist()) == list(range(var.L))
    logits = var(labels, other.teacher_inputs(tokens))                 # (2, L, V)
    conditioning, cache, drawn, inputs = var.conditioning(labels), var.new_cache(), 0, None
    for k, part in enumerate(logits.split(other.sizes, 1)):
        assert torch.allclose(var.step(k, inputs, conditioning, cache), part, atol=1e-5)
        drawn, inputs = other.next_input(k, drawn, tokens[k])
    step = torch.repeat_interleave(torch.arange(other.K), torch.tensor(other.sizes))
    for k in range(0, other.K, 3):
        changed = [(part + (i == k)) % 16 for i, part in enumerate(tokens)]
        moved = (var(labels, other.teacher_inputs(changed)) - logits).abs().amax((0, 2))
        assert moved[step <= k].max() == 0
        assert k == other.K - 1 or moved[step > k].max() > 1e-3


def test_a_markov_map_attends_to_itself_alone():
    """In one pass under its mask as in sampling, scale by scale and without a cache."""
    _, var = random_models()
    markov = import_module("experiments.scales").MarkovVAR(var.config).eval()
    markov.load_state_dict(var.state_dict())
    labels, inputs = torch.tensor([0, 2]), torch.randn(2, var.L - 1, 4, generator=seeded())
    with torch.no_grad():
        found, causal = markov(labels, inputs), var(labels, inputs)
        conditioning, parts = markov.conditioning(labels), [None, *inputs.split([4, 16], 1)]
        alone = [markov.step(k, part, conditioning, markov.new_cache())
                 for k, part in enumerate(parts)]
    assert torch.allclose(torch.cat(alone, 1), found, atol=1e-5)
    assert (found - causal)[:, 1:].abs().amax(2).min() > 1e-3, "the finer maps differ"


def test_the_loss_of_bits_is_a_likelihood():
    """The probabilities of all 2^10 images of five vectors with two bits each sum to 1."""
    infinity = import_module("experiments.infinity")
    torch.manual_seed(0)
    tokenizer = m2.MultiScaleVQVAE(m2.TokenizerConfig(
        image_size=8, scales=(1, 2), channels=8, groups=4, quantizer="bits", vocab_size=2,
        latent_dim=2)).eval().requires_grad_(False)
    var = opened(infinity.BitwiseVAR(m4.VARConfig(
        num_classes=2, scales=(1, 2), latent_dim=2, depth=2, width=16, heads=2)))
    bits = torch.arange(2 ** 10)[:, None] >> torch.arange(10) & 1      # (1024, 10)
    maps, classes = list(bits.split([2, 8], 1)), torch.ones(2 ** 10, dtype=torch.long)
    losses = infinity.bit_losses(var, classes, tokenizer.teacher_inputs(maps), bits)
    log_p = drawing.log_likelihood(tokenizer, var, maps, classes).sum(1)
    assert torch.allclose(-losses.sum(1), log_p, atol=1e-4)
    assert float(log_p.exp().sum()) == pytest.approx(1, abs=1e-4) and log_p.std() > 0.1
