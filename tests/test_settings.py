"""Settings: presets, recipes, options, and what makes a run the same run."""
import copy
import os
from dataclasses import fields
from importlib import import_module
from pathlib import Path

import pytest
import torch
from conftest import TINY

from engine import BadInput, checkpoints
from engine import settings as engine_settings

m5 = import_module("05_train")
SCRIPT = "05_train.py"
RELEASED = dict(channels=160, multipliers=(1, 1, 2, 2, 4), blocks=2, unshuffle=1, groups=32,
                attention=True, vocab_size=4096, latent_dim=32)
SIDES = {128: (1, 2, 3, 4, 6, 8), 256: (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
         512: (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)}


# -- Presets ---------------------------------------------------------------------------------------

def test_each_data_set_has_its_preset_and_typed_values_win_over_it():
    shown, config, var = m5.read_settings([])
    assert (shown.dataset, shown.out, config.image_size) == ("shapes", str(Path("out/shapes")), 32)
    shown, config, var = m5.read_settings(["--dataset", "cifar10"])
    assert config.vocab_size == 1024 and shown.flip and var.depth == 6
    shown, config, var = m5.read_settings("--dataset cifar10 --depth 3 --no-flip --out x --set "
                                          "cfg=3 shared_adaln=false".split())
    assert (var.depth, shown.flip, shown.out, config.vocab_size) == (3, False, "x", 1024)
    assert (shown.cfg, shown.top_p, var.shared_adaln, var.width) == (3, 0.9, False, 256)
    shown, config, _ = m5.read_settings(["--dataset", "/some/where/cats"])
    assert shown.out == str(Path("out/cats")) and config.image_size == 64
    shown, config, _ = m5.read_settings("--preset cifar10-cpu --steps 9".split())
    assert (shown.dataset, shown.out, shown.steps) == ("cifar10", str(Path("out/cifar10-cpu")), 9)
    assert shown.classes == ("automobile", "horse", "ship") and config.vocab_size == 512
    for name in ("shapes", "cifar10", "imagenet"):         # a preset brings its data set along
        assert m5.read_settings(["--preset", name])[0].dataset == name
    shown = m5.read_settings("--preset cifar10 --dataset imagenet --set classes=ant,bee".split())[0]
    assert (shown.dataset, shown.classes) == ("imagenet", ("ant", "bee"))


@pytest.mark.parametrize("name", ["shapes", "cifar10", "/some/folder"])
def test_an_image_size_brings_the_layout_that_fits_it(name):
    for side in (32, 64, 128, 256, 512):
        _, config, _ = m5.read_settings(["--dataset", name, "--image-size", str(side)])
        assert (config.image_size, config.unshuffle) == (side, 4)
        assert config.scales[-1] in (8, 16, 32)
    for side in (48, 64):                                  # without a layout, and against it
        typed = f"--image-size {side} --set scales=1,{side // 4} multipliers=1 unshuffle=4".split()
        assert m5.read_settings(["--dataset", name, *typed])[1].scales == (1, side // 4)


@pytest.mark.parametrize("depth, side, batch, epochs, base, last_decay, final", [
    (16, 256, 768, 200, 1e-4, 0.05, 0.1), (20, 256, 768, 250, 1e-4, 0.05, 0.1),
    (24, 256, 768, 350, 8e-5, 0.05, 0.01), (30, 256, 1024, 350, 8e-5, 0.08, 0.01),
    (36, 512, 768, 350, 8e-5, 0.08, 0.01)])
def test_the_imagenet_recipe_is_that_of_the_original(depth, side, batch, epochs, base, last_decay,
                                                     final):
    """Epochs are fixed; rate and steps follow from the batch and from the images there are."""
    for typed, images in ((None, 1_281_167), (256, 1_281_167), (64, 126_689)):
        options = f"--dataset imagenet --depth {depth}" + f" --batch-size {typed}" * bool(typed)
        shown, config, var = m5.read_settings(options.split())
        size = typed or batch
        text = m5.follow_recipe(shown, images)
        assert (shown.batch_size, shown.steps) == (size, epochs * images // size)
        assert shown.lr == pytest.approx(base * size / 256)
        assert (shown.weight_decay, shown.final_weight_decay) == (0.05, last_decay)
        assert (shown.final_lr, shown.optimizer, shown.clip) == (final, "adamw", 2.0)
        assert all(word in text for word in (f"{epochs} epochs", f"{shown.steps:,} steps",
                                             f"rate {shown.lr:.3g}"))
        assert (config.image_size, config.scales) == (side, SIDES[side])
        assert (var.depth, var.shared_adaln) == (depth, depth == 36)


def test_the_papers_loss_is_that_of_the_papers_recipe_and_of_old_runs(tmp_path):
    """And of the CIFAR-10 model that comes with the code. A run begun before there was a choice
    resumes where nothing has changed."""
    power = [m5.read_settings(["--preset", name])[0].side_power
             for name in ("imagenet", "cifar10-cpu", "shapes", "cifar10", "folder")]
    assert power == [0, 0, 1, 1, 1]
    old = dict(settings=dict(lr=1.0))
    checkpoints.check_identity(tmp_path, old, "transformer", dict(lr=1.0, side_power=0.0))
    with pytest.raises(BadInput, match="side_power 0.0 -> 1.0"):
        checkpoints.check_identity(tmp_path, old, "transformer", dict(lr=1.0, side_power=1.0))


def test_what_is_typed_wins_over_the_recipe():
    base = "--dataset imagenet --batch-size 256".split()
    for options, lr, steps in (("--lr 1", 1, 1_000_911), ("--steps 7", 1e-4, 7),
                               ("--set epochs=1", 1e-4, 5004)):
        shown, *_ = m5.read_settings([*base, *options.split()])
        m5.follow_recipe(shown, 1_281_167)
        assert (shown.lr, shown.steps) == (pytest.approx(lr), steps)
    for side in SIDES:
        shown, config, var = m5.read_settings(
            f"--dataset imagenet --depth 36 --image-size {side} --set shared_adaln=false "
            "weight_decay=0.1".split())
        assert {name: getattr(config, name) for name in RELEASED} == RELEASED
        assert (config.image_size, config.scales, var.shared_adaln) == (side, SIDES[side], False)
    assert (shown.weight_decay, shown.final_weight_decay, shown.batch_size) == (0.1, None, 768)


@pytest.mark.parametrize("cores, gpus, workers", [(1, 1, 1), (96, 8, 12), (6, 8, 1), (128, 1, 16)])
def test_workers_are_as_many_as_the_machine_has_cores_for(monkeypatch, cores, gpus, workers):
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)), raising=False)
    options = ["--gpus", str(gpus), "--tokenizer-batch-size", "8", "--batch-size", "8"]
    assert m5.read_settings(options)[0].workers == workers
    assert m5.read_settings([*options, "--workers", "3"])[0].workers == 3
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(gpus))      # torchrun counts them itself
    assert m5.read_settings(options[2:])[0].workers == workers


@pytest.mark.parametrize("cls", [m5.TokenizerSettings, m5.TransformerSettings])
def test_every_field_of_a_stages_settings_counts_and_no_other(cls):
    first, counted = m5.Settings(), {f.name for f in fields(cls)}
    for f in fields(m5.Settings):
        other = copy.copy(first)
        setattr(other, f.name, "changed")
        same = m5.fields_of(other, cls) == m5.fields_of(first, cls)
        assert same == (f.name not in counted), f.name
    assert {"dataset", "seed", "precision", "optimizer"} < counted
    free = {f.name for f in fields(engine_settings.RunSettings)}
    assert not free & counted and {"out", "gpus", "workers", "log_every", "accumulate"} < free


# -- Options ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("options, word", [
    ("--nonsense 3", "nonsense"), ("--step 3", "step"), ("--steps -1", "steps"),
    ("--steps 1.5", "steps"), ("--lr nan", "lr"), ("--lr x", "lr"), ("--steps", "steps"),
    ("--batch-size 0", "batch-size"), ("--stage three", "'three'"), ("--optimizer sgd", "muon"),
    ("--quantizer x", "quantizer"), ("--dataset nosuch", "'nosuch'"), ("--device tpu", "'tpu'"),
    ("--dataset imagenet", "--data-dir"), ("--set scales=1,2,x", "'x'"), ("--set lr", "NAME=VALUE"),
    ("--set scales=1,2,8", "last scale"), ("--seed -1", "seed"),
    ("--preset nosuch", "'nosuch'"), ("--classes ant dog", "'dog'"), ("--classes 9", "9"),
    ("--image-size 33", "scale"), ("--set nothing=3", "'nothing=3'"), ("--set flip=x", "'x'"),
    ("--set picture_loss=l3", "l1, l2"), ("--set num_classes=3", "num_classes"),
    ("--num-classes 3", "num-classes"), ("--set channels=0", "1 or more"),
    ("--batch-size 5 --gpus 2", "multiple of 2"), ("--set stps=3", " steps"),
    ("--tokenizer-batch-size 5 --gpus 2", "tokenizer-batch-size 5"),
    ("--accumulate 3", "multiple of 3"), ("--quantizer lfq --set latent_dim=32", "latent_dim=9"),
    ("--set heads=3 width=16", "heads"),
    ("--quantizer lfq --set latent_dim=5", "lfq"),
    ("--vgg-file x.pth", "--perceptual"), ("--tokenizer-file x.pth", "--stage transformer"),
    ("--perceptual 1 --image-size 8 --set multipliers=1", "16 pixels"), ("--shard", "adamw"),
    ("--shard --optimizer adamw", "--gpus"), ("--seed 36893488147419103232", "64 bits"),
    ("--export /no/such/folder/x.pt", "no such folder"), ("--set mlp_ratio=0.01", "mlp_ratio"),
    pytest.param("--device cuda", "cuda", marks=pytest.mark.skipif(
        torch.cuda.is_available(), reason="this machine has a GPU"))])
def test_a_wrong_option_is_one_line_and_leaves_no_trace(refused, picture_folder, tmp_path, options,
                                                        word):
    line = refused(SCRIPT, "--dataset", picture_folder, *TINY, "--out", tmp_path / "run",
                   *options.split())
    assert word in line and not (tmp_path / "run").exists()


def test_the_batch_is_divided_among_the_processes_of_torchrun_too(monkeypatch, refused):
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert "multiple of 3" in refused(SCRIPT, *TINY)
