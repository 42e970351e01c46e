"""The paper's ablation: raster order, the class as a token, and what rows share."""
from importlib import import_module

import pytest
import torch
from conftest import quick_table

ablation = import_module("experiments.ablation")
models = import_module("04_var_transformer")
tokenizers = import_module("02_multiscale_vqvae")


def one_map(side, C=4):
    torch.manual_seed(0)
    config = tokenizers.TokenizerConfig(image_size=16, scales=(side,), vocab_size=16, latent_dim=C,
                                        channels=8, groups=4)
    return tokenizers.MultiScaleVQVAE(config).eval()


def test_raster_order_is_shown_the_code_before_in_training_as_in_sampling():
    """And the image is that of the one map."""
    tokenizer = one_map(4)
    raster = ablation.Raster(tokenizer)
    whole = tokenizer.image_to_tokens(torch.rand(2, 3, 16, 16) * 2 - 1)
    tokens = list(whole[0].split(1, 1))
    shown, f_hat = raster.teacher_inputs(tokens), 0
    for k, token in enumerate(tokens):
        f_hat, after = raster.next_input(k, f_hat, token)
        assert after is None if k == 15 else torch.equal(after[:, 0], shown[:, k])
    assert torch.equal(shown[1, 6], tokenizer.quantizer.codebook[whole[0][1, 6]])
    assert torch.equal(raster.tokens_to_image(tokens), tokenizer.tokens_to_image(whole))


def test_of_a_class_token_later_tokens_learn_by_attention_alone():
    """Without its row the class changes nothing; with AdaLN it still would."""
    config = models.VARConfig(scales=(1,) * 4, vocab_size=8, latent_dim=4, depth=2, width=16,
                              heads=2, shared_adaln=True, num_classes=3)
    labels, inputs = torch.tensor([0, 1]), torch.randn(1, 3, 4).expand(2, -1, -1)
    moved = []
    for kind in (ablation.ClassToken, models.VAR):
        torch.manual_seed(0)
        var = kind(config).eval()
        torch.nn.init.normal_(var.head.weight)
        for p in var.parameters():
            p.data.add_(0.1 * torch.randn_like(p))
        with torch.no_grad():
            conditioning = var.conditioning(labels)
            alike = conditioning._replace(row=conditioning.row[:1].expand(2, -1, -1))
            for told in (conditioning, alike):
                var.conditioning = lambda labels, told=told: told
                logits = var(labels, inputs)
                moved.append(float((logits[0] - logits[1]).abs().max()))
    assert moved[0] > 1e-3 and moved[1] == 0 and moved[2] > 1e-3 and moved[3] > 1e-3


@pytest.mark.slow
def test_rows_of_the_ablation_and_which_of_them_share_a_training(cli):
    head, found = quick_table(cli, "experiments.ablation.py")
    sizes, bits = ([float(row[head.index(name)] or 0) for row in found]
                   for name in ("parameters, M", "bits an image"))
    assert len(found) == 12 and bits[2] == bits[3] == bits[4]
    assert sizes[1] < sizes[2] and bits[5] > bits[6]
    assert max(bits[0], bits[7], bits[8]) < 64 * 9 < bits[1], "tokens of 9 bits"
