"""Numbers of the original code, computed once and stored: ours must be the same.

golden/*.npz hold inputs and outputs of tiny models of the original; their weights are not stored
but drawn from their names. golden/released_keys.json lists names and shapes of the published
weights."""
import json
import zlib
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import scale_by_scale

from engine import released

GOLDEN = Path(__file__).parent / "golden"
m2, m4 = import_module("02_multiscale_vqvae"), import_module("04_var_transformer")
m6 = import_module("06_sample_and_edit")
TINY = json.loads((GOLDEN / "tiny_keys.json").read_text())
PUBLISHED = json.loads((GOLDEN / "released_keys.json").read_text())
SIDES = {"vae_ch160v4096z32_256": (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
         "vae_ch160v4096z32_512": (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)}
NOT_FILLED = ("ema_vocab_hit_SV", "zero_k_bias", "lvl_1L", "attn_bias_for_masking")
OURS_ALONE = {"quantizer.hits", "quantizer.sums", "quantizer.initialised"}    # of training only


def fill(shapes, salt):
    """A state dict whose every entry is drawn from its own name."""
    state = {}
    for name, shape in shapes.items():
        if name.endswith(NOT_FILLED):                 # derived buffers, zeros: any values will do
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
    """A tiny model of the original: -> (config, stored numbers, tokenizer, transformer)"""
    with np.load(GOLDEN / f"{request.param}.npz") as file:
        stored = {name: torch.from_numpy(file[name]) for name in file.files}
    entry, config = TINY[request.param], TINY[request.param]["config"]
    states = [fill(entry[part], config["salt"]) for part in ("vae", "var")]
    models = m6.load_released(*states, scales=config["patch_nums"], heads=config["heads"])
    return config, stored, *models


def off_by(found, expected):
    """Largest difference over the largest number."""
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


@pytest.mark.parametrize("grad", [False, True])
def test_logits_are_the_original_ones_at_once_and_scale_by_scale(case, grad):
    _, stored, _, var = case
    labels, shown = stored["labels"], stored["transformer_input"]
    with torch.set_grad_enabled(grad):
        assert off_by(var(labels, shown), stored["logits"]) < 1e-4
        assert off_by(scale_by_scale(var, labels, shown), stored["logits"]) < 1e-4


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
    """A published state dict without its numbers: sizes without memory."""
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def check_cover(state, model, config, released_name, parameters, alone=frozenset()):
    """Every published entry has one place in our model, every place is filled, shapes fit."""
    with torch.device("meta"):
        model = model(config)
    ours = model.state_dict()
    names = {old: released_name(old) for old in state}
    used = [new for new in names.values() if new is not None]
    assert sorted([*used, *alone]) == sorted(ours)
    for old, new in names.items():
        assert old.endswith(NOT_FILLED) if new is None else state[old].shape == ours[new].shape, old
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize("name", sorted(name for name in PUBLISHED if "var" in PUBLISHED[name]))
def test_each_published_entry_has_one_place_in_our_transformer(name):
    entry, config = PUBLISHED[name], PUBLISHED[name]["config"]
    state = on_meta(entry["var"])
    found = m4.VARConfig(**released.var_sizes(state, config["patch_nums"]))
    for ours, theirs in dict(depth="depth", width="width", heads="heads", num_classes="num_classes",
                             vocab_size="V", latent_dim="Cvae", shared_adaln="shared_aln",
                             qk_norm="attn_l2_norm").items():
        assert getattr(found, ours) == config[theirs], ours
    assert found.mlp_ratio == 4 and found.scales == tuple(config["patch_nums"])
    check_cover(state, m4.VAR, found, released.var_name, entry["parameters"])


@pytest.mark.parametrize("name, given", [(name, SIDES[name]) for name in SIDES] + [
    ("vae_ch160v4096z32_256", None)])                      # what the shapes alone cannot tell
def test_each_published_entry_has_one_place_in_our_tokenizer(name, given):
    entry = PUBLISHED[name]
    state = on_meta(entry["vae"])
    found = m2.TokenizerConfig(**released.tokenizer_sizes(state, given))
    settings = {**released.TOKENIZER, "image_size": int(name[-3:]), "scales": SIDES[name]}
    assert found == m2.TokenizerConfig(**settings)
    check_cover(state, m2.MultiScaleVQVAE, found, released.tokenizer_name, entry["parameters"],
                OURS_ALONE)
