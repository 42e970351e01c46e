"""Outputs of the original code, computed once and stored: ours must agree.

golden/*.npz hold inputs and outputs of tiny models of the original code, whose weights are
drawn from their names; released_keys.json the names and shapes of published weights.
"""
import json
import zlib
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import same, seeded

from engine import released

GOLDEN = Path(__file__).parent / "golden"
m2, m4 = import_module("02_multiscale_vqvae"), import_module("04_var_transformer")
m6 = import_module("06_sample_and_edit")
TINY = json.loads((GOLDEN / "tiny_keys.json").read_text())
PUBLISHED = json.loads((GOLDEN / "released_keys.json").read_text())


def fill(shapes, salt):
    """A state dict in which every entry is drawn from its own name."""
    state = {}
    for name, shape in shapes.items():
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


def off_by(found, expected):
    """The largest difference, relative to the largest number."""
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("name", sorted(TINY))
@torch.no_grad()
def test_tokens_images_logits_and_samples_equal_the_original(name):
    with np.load(GOLDEN / f"{name}.npz") as file:
        stored = {key: torch.from_numpy(file[key]) for key in file.files}
    config = TINY[name]["config"]
    scales = config["patch_nums"]
    states = [fill(TINY[name][part], config["salt"]) for part in ("vae", "var")]
    tokenizer, var = m6.load_released(*states, scales=scales, heads=config["heads"])

    assert off_by(tokenizer.encode(stored["image"]), stored["f"]) < 1e-4
    tokens = [stored[f"tokens_{k}"] for k in range(len(scales))]
    assert same(tokenizer.image_to_tokens(stored["image"]), tokens)
    first = tokenizer.decode(tokenizer.pyramid(tokens)[0]).clamp(-1, 1)
    assert off_by(first, stored["recon_first"]) < 1e-4
    assert off_by(tokenizer.tokens_to_image(tokens), stored["recon_last"]) < 1e-4
    inputs = stored["labels"], stored["transformer_input"]
    assert off_by(tokenizer.teacher_inputs(tokens), inputs[1]) < 1e-4
    assert off_by(var(*inputs), stored["logits"]) < 1e-4
    assert off_by(m4.scale_by_scale(var, *inputs), stored["logits"]) < 1e-4
    greedy = dict(cfg=3, top_k=1)
    nucleus = dict(cfg=2, top_k=max(2, config["V"] // 3), top_p=0.9)
    for wanted, how in (("greedy_image", greedy), ("seeded_image", nucleus)):
        image = m6.generate(tokenizer, var, inputs[0], **how, generator=seeded(5))
        assert off_by(image, stored[wanted]) < 1e-3


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_each_published_entry_has_one_place_in_our_model_and_none_stays_empty(name):
    entry = PUBLISHED[name]
    shapes = entry["var"] if "var" in entry else entry["vae"]
    state = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    with torch.device("meta"):
        if "var" in entry:
            fields, state = released.read_transformer(state)
            model = m4.VAR(m4.VARConfig(**fields))
            assert model.config.heads == entry["config"]["heads"]
        else:
            fields, state = released.read_tokenizer(
                state, released.SCALES[2240 if name.endswith("512") else 680])
            model = m2.MultiScaleVQVAE(m2.TokenizerConfig(**fields))
            assert name.endswith(str(model.config.image_size))
    places = {key: value.shape for key, value in model.state_dict().items()}
    for statistic in ("quantizer.hits", "quantizer.sums", "quantizer.initialised"):
        places.pop(statistic, None)                        # our training alone uses these
    assert {key: value.shape for key, value in state.items()} == places
    assert sum(p.numel() for p in model.parameters()) == entry["parameters"]
