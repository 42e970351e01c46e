"""Released weights: layouts, sizes, and the models that chapter 6 makes of them."""
import json
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import same

from engine import BadInput, files, released

m6, SCRIPT = import_module("06_sample_and_edit"), "06_sample_and_edit.py"
SHAPES = json.loads((Path(__file__).parent / "golden" / "tiny_keys.json").read_text())


def layout(name="plain"):
    """Random state dicts in a released layout, and the scales they were made for."""
    torch.manual_seed(0)
    states = [{key: 0.1 * torch.randn(shape) for key, shape in SHAPES[name][part].items()}
              for part in ("vae", "var")]
    return (*states, tuple(SHAPES[name]["config"]["patch_nums"]))


def test_weights_load_bare_or_nested_frozen_and_ready_to_sample():
    vae, var, scales = layout()
    nested = {"trainer": {"vae_local": vae}, "epoch": 3}, {"trainer": {"var_wo_ddp": var}}
    for one, other in zip(m6.load_released(vae, var, scales), m6.load_released(*nested, scales)):
        assert same(one.state_dict(), other.state_dict())
        assert not any(module.training for module in other.modules())
        everything = [*other.parameters(), *other.buffers()]
        assert not any(x.is_meta or x.requires_grad for x in everything)


def without(state, name):
    return {key: value for key, value in state.items() if key != name}


def our_names(vae, var, scales):
    return [dict(model.state_dict()) for model in m6.load_released(vae, var, scales)]


ATTENTION, POSITIONS = "blocks.1.attn.proj.weight", "pos_1LC"
ENTRIES = [{ATTENTION: torch.zeros(3, 3)}, {"class_emb.weight": torch.zeros(7)},
           {POSITIONS: torch.zeros(30)}, {POSITIONS: "thirty"}, {5: torch.zeros(1)}]


@pytest.mark.parametrize("wrong", [
    lambda vae, var, scales: (var, vae, scales), lambda vae, var, scales: ({}, {}, scales),
    lambda vae, var, scales: (vae, var, (1, 2, 3)), lambda vae, var, scales: (vae, var, None),
    lambda vae, var, scales: ({"trainer": 5}, var, scales),
    lambda vae, var, scales: ({**vae, "encoder.extra": torch.zeros(1)}, var, scales),
    lambda vae, var, scales: (vae, without(var, ATTENTION), scales),
    lambda vae, var, scales: (*our_names(vae, var, scales), scales),
    *[lambda vae, var, scales, entry=entry: (vae, {**var, **entry}, scales) for entry in ENTRIES]])
def test_other_files_are_refused_in_one_line(wrong):
    with pytest.raises(BadInput, match=r"\A.*\Z"):
        m6.load_released(*wrong(*layout()))


@pytest.fixture
def offered(monkeypatch, tmp_path):
    """d16 and (shared modulation) d36, tiny, where downloads would lie. -> options that load one"""
    scales = layout()[2]
    monkeypatch.setitem(released.SCALES, sum(side * side for side in scales), scales)
    monkeypatch.setattr(files, "DOWNLOADS", tmp_path / "downloads")
    (tmp_path / "downloads").mkdir()
    for name, (which, part) in {"vae_ch160v4096z32": ("plain", 0), "var_d16": ("plain", 1),
                                "var_d36": ("shared_adaln", 1)}.items():
        torch.save(layout(which)[part], tmp_path / "downloads" / f"{name}.pth")
    return lambda name: ("--released", name, "--device", "cpu", "--out", tmp_path / "made")


@pytest.mark.parametrize("name, precision", [("d16", "auto"), ("d16", "float16"),
                                             ("d36", "bfloat16")])
def test_a_released_model_samples_in_the_precision_asked_for(
        cli, offered, monkeypatch, name, precision):
    seen, draw = [], m6.generate
    monkeypatch.setattr(m6, "generate", lambda *models, **how: seen.append(models) or
                        draw(*models, **how))
    result = cli(SCRIPT, *offered(name), "--export-npz", "a.npz", "--n", 2, "--classes", "class 3",
                 "--precision", precision)
    assert result.status == 0, result.err
    (tokenizer, var, _), = seen
    wanted = torch.float32 if precision == "auto" else getattr(torch, precision)
    layers = [x for x in var.modules() if isinstance(x, torch.nn.Linear)]
    assert {x.weight.dtype for x in layers} == {wanted} and len(layers) > 5
    for name, x in tokenizer.named_parameters():           # what encodes stays exact
        decodes = name.startswith(("decoder", "post_quant_conv"))
        assert x.dtype == (wanted if decodes else torch.float32), name
    with np.load("a.npz") as file:
        assert file["arr_0"].shape == (2, 64, 64, 3) and np.ptp(file["arr_0"]) > 20


@pytest.mark.parametrize("options", [
    "--task density", "--task evaluate", "--classes 99", "--classes goldfish",
    "--tokenizer-file none.pth", "--var-file downloads/vae_ch160v4096z32.pth"])
def test_what_a_released_model_cannot_do_is_one_line(offered, refused, options):
    refused(SCRIPT, *offered("d16"), *options.split())
