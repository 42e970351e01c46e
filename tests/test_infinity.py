"""Bitwise modelling: bits, their likelihood, and flips that finer maps correct."""
from importlib import import_module

import numpy as np
import pytest
import torch
from conftest import table

from engine.processes import Processes

infinity = import_module("experiments.infinity")


def bit_tokenizer(bits, scales=(1, 2, 4)):
    """Untrained, with codes of about the size of a random f, and phi without a convolution."""
    torch.manual_seed(0)
    side = scales[-1] * 4
    tokenizer = infinity.vqvae.MultiScaleVQVAE(infinity.vqvae.TokenizerConfig(
        image_size=side, scales=scales, channels=8, groups=4, quantizer="bits", vocab_size=2,
        latent_dim=bits)).eval().requires_grad_(False)
    for phi in tokenizer.phis:
        torch.nn.init.dirac_(phi.weight)
        phi.bias.zero_()
    tokenizer.quantizer.size = 0.5
    return tokenizer


def bit_transformer(bits, scales):
    torch.manual_seed(1)
    var = infinity.BitwiseVAR(infinity.transformer.VARConfig(
        num_classes=2, scales=scales, vocab_size=2, latent_dim=bits, depth=2, width=16,
        heads=2)).eval().requires_grad_(False)
    for p in var.parameters():                             # shut gates would prove nothing
        p.add_(0.3 * torch.randn_like(p))
    return var


def test_bits_side_by_side_are_the_index_of_chapter_1():
    bits, index = infinity.BitQuantizer(9), infinity.vq.LookupFreeQuantizer(9)
    x = torch.randn(2, 5, 9)
    tokens, idx = bits.nearest(x), index.nearest(x)
    written = ["".join(str(int(bit)) for bit in row[::-1]) for row in
               tokens.view(10, 9).numpy()]                 # bit 0 is written last
    assert [int(text, 2) for text in written] == idx.flatten().tolist()
    assert torch.equal(bits.lookup(tokens), index.lookup(idx))
    assert torch.equal(bits.extra_loss(x), index.extra_loss(x))
    tokenizer, image = bit_tokenizer(9), torch.randn(2, 3, 16, 16)
    tokenizer.quantizer.size = index.size
    again = infinity.with_indices(tokenizer)
    assert [t.shape for t in again.image_to_tokens(image)] == [(2, 1), (2, 4), (2, 16)]
    assert torch.equal(*(t.tokens_to_image(t.image_to_tokens(image)) for t in (tokenizer, again)))


@pytest.mark.parametrize("bits, scales", [(3, (1,)), (2, (1, 2))])
def test_the_bitwise_likelihood_of_all_images_sums_to_1(bits, scales):
    """2^3 images of one vector; 2^10 of five vectors in two maps."""
    tokenizer, var = bit_tokenizer(bits, scales), bit_transformer(bits, scales)
    count = bits * sum(side * side for side in scales)
    every = torch.arange(2 ** count)[:, None] >> torch.arange(count) & 1
    maps = list(every.split([bits * side * side for side in scales], 1))
    p = infinity.drawing.log_likelihood(tokenizer, var, maps, torch.ones(len(every)).long())
    assert float(p.sum(1).exp().sum()) == pytest.approx(1, abs=1e-4)
    assert p.sum(1).std() > 0.1


def test_two_outputs_a_bit_and_a_temperature_for_each_scale():
    """2^32 codes take 64 outputs; the cold map is the likeliest one, the hot one is noise."""
    tokenizer, var = bit_tokenizer(32), bit_transformer(32, (1, 2, 4))
    assert var.head.out_features == 64
    labels = torch.zeros(200).long()
    cold, _, hot = infinity.drawing.sample_tokens(
        tokenizer, infinity.Cooled(var, [1e-6, 1, 1e6]), labels)
    first = var.step(0, None, var.conditioning(labels), var.new_cache())
    assert first.shape == (200, 32, 2) and torch.equal(cold, first.argmax(-1))
    assert hot.shape == (200, 16 * 32) and abs(hot.float().mean(0) - 0.5).max() < 0.2


def test_after_a_flip_finer_maps_correct_the_mistake():
    """Labels are the bits before they flip, inputs come from those after; without flips both are
    chapter 2's."""
    tokenizer = bit_tokenizer(6)
    f = torch.randn(8, 6, 4, 4)
    clean = tokenizer.quantize(f)
    labels, inputs = infinity.flipped_rounds(tokenizer, f, torch.zeros(8, 3))
    assert torch.equal(labels, torch.cat(clean, 1))
    assert torch.equal(inputs, tokenizer.teacher_inputs(clean))
    labels, inputs = infinity.flipped_rounds(tokenizer, f, torch.tensor([[1.0, 0, 0]]).repeat(8, 1))
    first, *finer = labels.split([6, 24, 96], 1)
    assert torch.equal(first, clean[0])
    assert torch.equal(inputs, tokenizer.teacher_inputs([1 - first, *finer]))
    corrected, stale = ((f - tokenizer.features([1 - first, *maps])).square().sum((1, 2, 3))
                        for maps in (finer, clean[1:]))
    assert (corrected < 0.8 * stale).all()
    labels, _ = infinity.flipped_rounds(tokenizer, f, torch.tensor([[0, 0, 1.0]]).repeat(8, 1))
    assert torch.equal(labels, torch.cat(clean, 1)), "no map comes after the last"


def test_bits_flip_in_training_only_and_the_loss_is_the_likelihood_of_a_bit():
    tokenizer = bit_tokenizer(4)
    images, labels = torch.randint(256, (6, 16, 16, 3), dtype=torch.uint8).numpy(), [0, 1] * 3
    data = {split: (images, np.array(labels)) for split in ("train", "test")}
    settings = infinity.training.Settings(precision="float32", side_power=0.0)
    stage = infinity.bitwise(0.3)(settings, Processes("cpu"), tokenizer,
                                  bit_transformer(4, (1, 2, 4)).config, data, ["a", "b"])
    stage.model.load_state_dict(bit_transformer(4, (1, 2, 4)).state_dict())
    image, classes = stage.rows("test", np.arange(6))
    stage.model.eval()
    loss = float(stage.loss(stage.model, (image, classes), 0.5)[0].detach())
    p = infinity.drawing.log_likelihood(tokenizer, stage.model, tokenizer.image_to_tokens(image),
                                        classes)
    assert loss == pytest.approx(float(-p.sum(1).mean()) / (21 * 4), rel=1e-5)
    stage.model.train()
    stage.model.config.label_dropout = 0
    flipped = stage.loss(stage.model, (image, classes), 0.5)[0].detach()
    assert abs(float(flipped) - loss) > 1e-3


@pytest.mark.slow
def test_the_infinity_experiment_prints_its_table(cli):
    result = cli("experiments.infinity.py", "--quick", "--seeds", 1)
    assert result.status == 0, result.err
    head, *found, floor = table(result.out)
    assert {len(row) for row in [*found, floor]} == {len(head)}
    assert [row[3] for row in found] == ["512", "512", "18", "32", "64", "32"]
    spent, possible = zip(*(row[4].split(" of ") for row in found))
    assert possible == ("1,170", "1,170", "1,170", "2,080", "4,160", "2,080")
    assert all(0.9 * float(p.replace(",", "")) < float(bits) for bits, p in zip(spent, possible))
    assert len(set(spent)) == 6 and found[1][1] == found[2][1] != found[0][1]


def test_flips_and_temperatures_out_of_range_are_one_line(refused):
    for options in ("--flips 1.5", "--flips nan", "--cool 0", "--cool nan"):
        assert "--flips" in refused("experiments.infinity.py", "--quick", *options.split())
