"""Outputs of the original code, computed once and stored: ours must agree.

golden/*.npz hold inputs and outputs of tiny models of the original, whose weights are not stored
but drawn from their names. golden/released_keys.json lists the names and shapes of the published
weights."""
import json
import zlib
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch

from engine import released

GOLDEN = Path(__file__).parent / "golden"
m2, m4 = import_module("02_multiscale_vqvae"), import_module("04_var_transformer")
m6 = import_module("06_sample_and_edit")
TINY = json.loads((GOLDEN / "tiny_keys.json").read_text())
PUBLISHED = json.loads((GOLDEN / "released_keys.json").read_text())
SIDES = {"vae_ch160v4096z32_256": (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
         "vae_ch160v4096z32_512": (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)}
NOT_FILLED = ("ema_vocab_hit_SV", "zero_k_bias", "lvl_1L", "attn_bias_for_masking")
OURS_ALONE = {"quantizer.hits", "quantizer.sums", "quantizer.initialised"}    # for training only


def fill(shapes, salt):
    """A state dict, every entry of which is drawn from its own name."""
    state = {}
    for name, shape in shapes.items():
        if name.endswith(NOT_FILLED):                 # derived buffers: any values will do
            state[name] = torch.zeros(shape)
            continue
        x = np.random.default_rng(zlib.crc32(name.encode()) + salt).standard_normal(shape)
        x = x.astype("float32")
        if name.endswith("scale_mul_1H11"):
            x = np.log(4) + 0.3 * x
        elif len(shape) == 1:
            x = 1 + 0.1 * x if "norm" in name and name.endswith("weight") else 0.1 * x
        elif "embedding" in name:
            pass
        elif any(word in name for word in ("class_emb", "pos_", "lvl_embed", "ada_gss")):
            x = 0.5 * x
        else:
            x = x / np.sqrt(np.prod(shape[1:]))
        state[name] = torch.from_numpy(np.asarray(x, dtype="float32"))
    return state


@pytest.fixture(scope="module", params=sorted(TINY))
def case(request):
    """A tiny model of the original -> (config, stored outputs, tokenizer, transformer)"""
    with np.load(GOLDEN / f"{request.param}.npz") as file:
        stored = {name: torch.from_numpy(file[name]) for name in file.files}
    entry, config = TINY[request.param], TINY[request.param]["config"]
    states = [fill(entry[part], config["salt"]) for part in ("vae", "var")]
    models = m6.load_released(*states, scales=config["patch_nums"], heads=config["heads"])
    return config, stored, *models


def off_by(found, expected):
    """The largest difference, relative to the largest number."""
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max())


# -- Tiny models -----------------------------------------------------------------------------------

@torch.no_grad()
def test_images_and_tokens_are_the_original_ones(case):
    config, stored, tokenizer, _ = case
    assert off_by(tokenizer.encode(stored["image"]), stored["f"]) < 1e-4
    expected = [stored[f"tokens_{k}"] for k in range(len(config["patch_nums"]))]
    for tokens in (tokenizer.quantize(stored["f"]), tokenizer.image_to_tokens(stored["image"])):
        for found, wanted in zip(tokens, expected, strict=True):
            assert torch.equal(found, wanted)
    first = tokenizer.decode(tokenizer.pyramid(expected)[0]).clamp(-1, 1)
    assert off_by(first, stored["recon_first"]) < 1e-4
    assert off_by(tokenizer.tokens_to_image(expected), stored["recon_last"]) < 1e-4
    assert off_by(tokenizer(stored["image"])[0].clamp(-1, 1), stored["recon_last"]) < 1e-4
    assert off_by(tokenizer.teacher_inputs(expected), stored["transformer_input"]) < 1e-4


@torch.no_grad()
def test_logits_are_the_original_ones_at_once_and_scale_by_scale(case):
    _, stored, _, var = case
    labels, shown = stored["labels"], stored["transformer_input"]
    assert off_by(var(labels, shown), stored["logits"]) < 1e-4
    assert off_by(m4.scale_by_scale(var, labels, shown), stored["logits"]) < 1e-4


@torch.no_grad()
def test_greedy_and_seeded_samples_are_the_original_ones(case):
    config, stored, tokenizer, var = case
    greedy = dict(cfg=3, top_k=1)
    seeded = dict(cfg=2, top_k=max(2, config["V"] // 3), top_p=0.9)
    for name, how in (("greedy_image", greedy), ("seeded_image", seeded)):
        image = m6.generate(tokenizer, var, stored["labels"], **how,
                            generator=torch.Generator().manual_seed(5))
        assert image.min() >= 0 and image.max() <= 1
        assert off_by(image, stored[name]) < 1e-3


# -- Published weights -----------------------------------------------------------------------------

def on_meta(shapes):
    """A published state dict without its numbers: shapes that need no memory."""
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def check_cover(model, state, parameters, ours_alone=frozenset()):
    """Every published entry has one place in our model, every place is filled, shapes agree."""
    places = {name: value.shape for name, value in model.state_dict().items()}
    found = {name: value.shape for name, value in state.items()}
    assert found == {name: shape for name, shape in places.items() if name not in ours_alone}
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize("name", sorted(name for name in PUBLISHED if "var" in PUBLISHED[name]))
def test_each_published_entry_has_one_place_in_our_transformer(name):
    entry, config = PUBLISHED[name], PUBLISHED[name]["config"]
    fields, state = released.read_transformer(on_meta(entry["var"]), config["patch_nums"])
    with torch.device("meta"):
        var = m4.VAR(m4.VARConfig(**fields))
    assert var.config.depth == config["depth"] and var.config.heads == config["heads"]
    check_cover(var, state, entry["parameters"])


@pytest.mark.parametrize("name, given", [(name, SIDES[name]) for name in SIDES] + [
    ("vae_ch160v4096z32_256", None)])                      # what the shapes alone cannot tell
def test_each_published_entry_has_one_place_in_our_tokenizer(name, given):
    entry = PUBLISHED[name]
    fields, state = released.read_tokenizer(on_meta(entry["vae"]), given)
    found = m2.TokenizerConfig(**fields)
    settings = {**released.TOKENIZER, "image_size": int(name[-3:]), "scales": SIDES[name]}
    assert found == m2.TokenizerConfig(**settings)
    with torch.device("meta"):
        tokenizer = m2.MultiScaleVQVAE(found)
    check_cover(tokenizer, state, entry["parameters"], OURS_ALONE)
