"""Chapter 5: settings, both loops, what they log, and when a run resumes. The graders of the
exercises check the loss of a token, the order of the images and the adversarial weight."""
import json
import os
import re
import shutil
from importlib import import_module
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, log_of, same
from hypothesis import given
from hypothesis import strategies as st

from data import imagenet
from engine import BadInput, checkpoints, distributed, perceptual, released

m2, m4, m5 = map(import_module, ("02_multiscale_vqvae", "04_var_transformer", "05_train"))
SCRIPT, CPU = "05_train.py", torch.device("cpu")


# -- Settings --------------------------------------------------------------------------------------

def test_the_options_that_other_people_use_exist():
    assert set("""dataset preset data_dir classes stage tokenizer_file tokenizer_steps
        tokenizer_batch_size steps batch_size lr depth image_size vocab_size views workers gpus
        device precision compile accumulate activation_checkpointing perceptual adversarial seed
        out fresh save_every log_every export width heads channels scales""".split()) <= set(
            m5.NAMES)


@given(name=st.sampled_from(sorted(m5.PRESETS)), typed=st.fixed_dictionaries({}, optional=dict(
    seed=st.integers(0, 9), cfg=st.floats(0, 4), views=st.integers(1, 4))))
def test_a_typed_option_wins_over_the_preset_and_the_preset_over_the_default(name, typed):
    words = [(f"--{key}", str(value)) for key, value in typed.items()]
    settings = m5.read_settings(["--preset", name, *sum(words, ())])
    wanted = vars(m5.Settings()) | m5.PRESETS[name] | typed
    for key in ("seed", "cfg", "views"):
        assert getattr(settings, key) == wanted[key], key
    assert settings.out == os.path.join("out", name)


@pytest.mark.parametrize("dataset", ["shapes", "cifar10", str(ROOT), "imagenet"])
def test_the_token_maps_follow_from_the_image_size(dataset):
    known = {32: (1, 2, 3, 4, 6, 8), 256: released.SCALES[680], 512: released.SCALES[2240]}
    for side in [64, 128, 256, 512] if dataset == "imagenet" else [32, 64, 128, 256, 512]:
        settings = m5.read_settings(["--dataset", dataset, "--image-size", str(side)])
        scales, halvings = settings.scales, len(settings.multipliers) - 1
        assert scales == known.get(side, scales) and scales[0] == 1
        assert scales[-1] == side // settings.unshuffle // 2 ** halvings
        assert all(small < large <= 2 * small for small, large in pairwise(scales))


@pytest.mark.parametrize("depth, side, batch, epochs, rate, last_decay, final", [
    (16, 256, 768, 200, 1e-4, 0.05, 0.1), (20, 256, 768, 250, 1e-4, 0.05, 0.1),
    (24, 256, 768, 350, 8e-5, 0.05, 0.01), (30, 256, 1024, 350, 8e-5, 0.08, 0.01),
    (36, 512, 768, 350, 8e-5, 0.08, 0.01)])
def test_the_imagenet_recipe_is_that_of_the_original(
        depth, side, batch, epochs, rate, last_decay, final):
    words = ["--dataset", "imagenet", "--depth", str(depth)]
    for typed, size in ([], batch), (["--batch-size", "64"], 64):
        found = m5.read_settings([*words, *typed])
        assert (found.batch_size, found.epochs, found.optimizer) == (size, epochs, "adamw")
        assert found.lr == pytest.approx(rate * size / 256)
    assert (found.weight_decay, found.final_weight_decay) == (0.05, last_decay)
    assert (found.final_lr, found.clip, found.image_size) == (final, 2.0, side)
    var = m5.var_config(found, m5.tokenizer_config(found), 1000)
    assert (var.width, var.heads, var.shared_adaln) == (64 * depth, depth, depth == 36)
    assert var.drop_path == pytest.approx(0.1 * depth / 24)
    found = m5.read_settings([*words, "--lr", "1", "--steps", "7"])
    assert (found.lr, found.steps, found.epochs) == (1, 7, 0)


@given(progress=st.floats(0, 1), final=st.floats(0, 1))
def test_the_learning_rate_warms_up_stays_flat_and_falls_along_a_line(progress, final):
    wanted = np.interp(progress, [0, 0.02, 0.05, 1], [0.005, 1, 1, final])
    assert m5.learning_rate(progress, final) == pytest.approx(wanted, abs=1e-9)


@pytest.mark.parametrize("options, word", [
    ("--step 3", "step"), ("--steps -1", "steps"), ("--steps 1.5", "steps"),
    ("--steps 9223372036854775808", "steps"), ("--steps", "steps"), ("--lr nan", "lr"),
    ("--lr x", "lr"), ("--batch-size 0", "at least 1"), ("--stage three", "'three'"),
    ("--dataset nosuch", "'nosuch'"), ("--seed -1", "seed"), ("--preset nosuch", "nosuch"),
    ("--scales 1,2,x", "'x'"), ("--scales 1,2,8", "last scale"), ("--image-size 33", "last scale"),
    ("--classes ant dog", "'dog'"), ("--classes 9", "9"), ("--heads 3", "heads"),
    ("--drop-path 1", "drop_path"), ("--accumulate 3", "multiples of 3"),
    ("--batch-size 5 --gpus 2", "multiples of 2"), ("--tokenizer-file nowhere.pth", "nowhere.pth"),
    ("--quantizer lfq --latent-dim 5", "latent_dim"), ("--stage transformer", "--stage tokenizer"),
    ("--gpus 99 --batch-size 99 --tokenizer-batch-size 99 --device auto", "--gpus 99"),
    pytest.param("--device cuda", "cuda", marks=pytest.mark.skipif(
        torch.cuda.is_available(), reason="this machine has a GPU"))])
def test_a_wrong_option_is_one_line_and_leaves_no_trace(
        refused, picture_folder, tmp_path, options, word):
    line = refused(SCRIPT, "--dataset", picture_folder, *TINY, "--out", tmp_path / "run",
                   *options.split())
    assert word in line and not (tmp_path / "run").exists()


def test_the_imagenet_command_as_typed_says_where_the_images_belong(
        refused, monkeypatch, tmp_path):
    monkeypatch.setattr(imagenet, "DEFAULT_FOLDER", tmp_path / "data" / "imagenet")
    line = refused(SCRIPT, "--dataset", "imagenet", "--gpus", 8)
    assert str(Path("data", "imagenet")) in line and "--data-dir" in line


# -- A whole run -----------------------------------------------------------------------------------

def test_one_command_trains_both_stages_and_draws_samples(tiny):
    files = {path.name for path in tiny.folder.iterdir()}
    assert {"settings.json", "samples.png", "reconstructions.png"} <= files
    assert not any(name.endswith(".tmp") for name in files) and tiny.stderr == ""
    entries = log_of(tiny.folder)
    steps = [e for e in entries if e["stage"] == "transformer" and "loss" in e]
    assert [e["step"] for e in steps] == list(range(1, 25))
    assert abs(steps[0]["loss"] - np.log(16)) < 0.1
    held_out = [e for e in entries if "held_out" in e]
    assert [e["step"] for e in held_out] == 2 * [6, 12, 18, 24]
    assert held_out[0]["held_out"]["psnr"] < held_out[3]["held_out"]["psnr"]
    assert held_out[4]["held_out"]["loss"] > held_out[7]["held_out"]["loss"]
    # The transformer alone and plain values; classes as in the data, and the row of no class.
    state = torch.load(tiny.folder / "transformer.pt", weights_only=True)
    assert state["class_names"] == ["ant", "bee", "cat"]
    assert len(state["model"]["class_embed.weight"]) == 3 + 1
    model = m4.VAR(m4.VARConfig(**state["config"]))
    assert set(state["model"]) == set(model.state_dict())


@pytest.mark.parametrize("name", ["shapes.pt", "cifar10.pt"])
def test_shipped_models_load_frozen_and_in_eval_mode(name):
    for load in (m5.load_tokenizer, m5.load_transformer):
        model, about = load(ROOT / "data" / "pretrained" / name)
        assert not model.training and not any(p.requires_grad for p in model.parameters())
        assert about["class_names"] and "model" not in about


def test_a_flat_folder_makes_an_unconditional_model_and_an_export_holds_both_models(
        cli, tiny, tmp_path):
    folder = shutil.copytree(tiny.pictures / "ant", tmp_path / "flat")
    result = cli(SCRIPT, *tiny.options, "--dataset", folder, "--tokenizer-steps", 2, "--steps", 2,
                 "--quantizer", "lfq", "--precision", "bfloat16", "--activation-checkpointing",
                 "--out", tmp_path / "run", "--export", tmp_path / "both.pt")
    assert result.status == 0, result.err
    assert np.isfinite([e["loss"] for e in log_of(tmp_path / "run") if "loss" in e]).all()
    m5.load_tokenizer(tmp_path / "both.pt")
    model, about = m5.load_transformer(tmp_path / "both.pt")
    assert about["class_names"] == ["flat"]
    assert model.config.num_classes == 1


def test_epochs_become_steps_and_some_classes_train_stage_2_on_the_tokenizer_of_all(
        cli, refused, tiny, tmp_path):
    """The tokenizer knows the image size."""
    shutil.copytree(tiny.folder, tmp_path / "run")
    (tmp_path / "run" / "transformer.pt").unlink()
    words = ["--stage", "transformer", "--epochs", 2, "--dataset", tiny.pictures, "--out",
             tmp_path / "run", *"--width 16 --heads 2 --depth 1 --batch-size 4 --workers 0 "
             "--device cpu --precision float32 --classes".split()]
    out = cli(SCRIPT, *words, "cat", "bee").out
    n = int(re.search(r"(\d+) images to train on, \d held out, 2 classes", out)[1])
    assert 30 < n < 40, "without the ants, a third of 57"
    state = checkpoints.load_checkpoint(tmp_path / "run" / "transformer.pt")
    assert state["class_names"] == ["bee", "cat"] and state["config"]["num_classes"] == 2
    assert f"resuming at step {2 * n // 4}" in cli(SCRIPT, *words, "Bee", "2").out
    assert "classes" in refused(SCRIPT, *words, "2")       # the first two are other classes


# -- The loops, on noise ---------------------------------------------------------------------------

NOISE = np.random.default_rng(0).integers(0, 255, (32, 16, 16, 3), dtype=np.uint8)
TOKENS = list(np.random.default_rng(0).integers(0, 16, (2, 32, 21), dtype=np.uint16))
LABELS = np.arange(32) // 11                               # sorted, as in class folders


def train(stage, out, **changes):
    """One stage, without a data set. -> the tokenizer, the entries of the steps in the log"""
    settings = m5.read_settings([*TINY, "--out", str(out)])
    sizes = dict(tokenizer_batch_size=8, batch_size=8, tokenizer_steps=10, steps=10)
    vars(settings).update(sizes | changes)
    out.mkdir(exist_ok=True)
    torch.manual_seed(0)
    tokenizer = m2.MultiScaleVQVAE(m5.tokenizer_config(settings))
    if settings.quantizer == "vq":
        tokenizer.quantizer.initialised.fill_(True)        # the codes need not start on the data
    about = dict(class_names=["a", "b", "c"], dataset="noise")
    if stage == "tokenizer":
        held_out = torch.from_numpy(NOISE[:4])
        m5.train_tokenizer(settings, tokenizer, NOISE, held_out, about, CPU)
    else:
        tokenizer.eval().requires_grad_(False)
        var = m4.VAR(m5.var_config(settings, tokenizer.config, 3))
        data = [(TOKENS, LABELS), ([TOKENS[0][:20]], LABELS[:20])]
        m5.train_transformer(settings, var, tokenizer, lambda: data, about, CPU)
    return tokenizer, [e for e in log_of(out) if "held_out" not in e]


def spy(monkeypatch, owner, name, change=lambda result, calls: result):
    """Record arguments and results of a function. change(result, calls) -> what it returns"""
    calls, real = [], getattr(owner, name)

    def wrapper(*args, **options):
        result = real(*args, **options)
        calls.append((args, result))
        return change(result, calls)
    monkeypatch.setattr(owner, name, wrapper)
    return calls


def test_stage_1_adds_the_four_terms_of_its_loss_and_logs_the_mean_of_all_parts(
        monkeypatch, tmp_path):
    class Lpips(torch.nn.Module):
        def forward(self, decoded, image):
            return torch.tensor([6.0, 8.0])
    monkeypatch.setattr(perceptual, "load_perceptual", Lpips)
    monkeypatch.setattr(perceptual, "adversarial_losses", lambda *_: (torch.tensor(100.0), 0.0))
    forward = spy(monkeypatch, m2.MultiScaleVQVAE, "forward")
    loaded = spy(monkeypatch, m5, "to_float")
    tokenizer, entries = train("tokenizer", tmp_path / "run", perceptual=3.0, adversarial=0.5,
                               flip=True, accumulate=4, quantizer="lfq")
    assert not any(p.requires_grad for p in tokenizer.parameters()) and not tokenizer.training
    for step, entry in enumerate(entries):
        losses, db = [], []
        for (_, image), (decoded, _, parts) in forward[4 * step:4 * step + 4]:
            error, vq, extra = (float(x.detach()) for x in parts.values())
            losses.append(error + 3 * 7 + 0.25 * vq + extra)
            errors = (decoded.detach().clamp(-1, 1) - image).square().mean((1, 2, 3))
            db += (10 * (4 / errors).log10()).tolist()     # of each image, not of the mean error
        late = min(max(0, (step / 10 - 0.2) / 0.2), 1)     # the critic joins after a fifth
        assert entry["loss"] == pytest.approx(np.mean(losses) + 0.5 * late * 100, rel=1e-5)
        assert entry["psnr"] == pytest.approx(np.mean(db), rel=1e-5)
    shown = torch.cat([image for (_, image), _ in forward])
    image = torch.cat([result for _, result in loaded])
    plain, mirrored = ((shown == x).flatten(1).all(1) for x in (image, image.flip(3)))
    assert (plain ^ mirrored).all()
    assert 0.3 < mirrored.float().mean() < 0.7
    assert len(mirrored.view(10, 8).unique(dim=0)) > 5, "others in each step"


@pytest.mark.parametrize("stage, changes", [
    ("tokenizer", dict(learn="gradient", adversarial=1.0)), ("transformer", dict(drop_path=0.0))])
def test_a_batch_in_parts_has_the_loss_and_the_gradient_of_the_whole(
        monkeypatch, tmp_path, stage, changes):
    monkeypatch.setattr(perceptual, "start_late", lambda progress: 1.0)
    found = []
    for parts in (1, 2, 8):
        _, entries = train(stage, tmp_path / str(parts), accumulate=parts, label_dropout=0.0,
                           steps=2, tokenizer_steps=2, **changes)
        found.append([entries[0]["loss"], entries[0]["grad"], entries[1]["loss"]])
    # The adversarial weight is a ratio of gradients, which differs a little from part to part.
    assert np.allclose(found, found[0], rtol=0.05 if "adversarial" in changes else 1e-4)


def test_stage_2_is_shown_shuffled_rows_of_the_cache_and_leaves_the_tokenizer_alone(
        monkeypatch, tmp_path):
    """A model that sees one class after the other learns nothing. 2 views of 32 images, 8 a step:
    each view of each image once in 8 steps, with its label, then in another order."""
    monkeypatch.setattr(m2.MultiScaleVQVAE, "encode", lambda *_: pytest.fail("encoded again"))
    calls = spy(monkeypatch, m5, "token_losses")
    tokenizer, _ = train("transformer", tmp_path / "run", steps=16)
    held_out, (loss, _) = log_of(tmp_path / "run")[-1]["held_out"], calls[-1][1]
    assert held_out["loss"] == pytest.approx(float(loss.mean()), rel=1e-5) and len(loss) == 20
    rows = {tuple(row): i for i, row in enumerate(np.concatenate(TOKENS).tolist())}
    seen = []
    for (_, _, tokens, labels), _ in calls:
        if len(labels) == 8:                               # 20 are held out
            seen.append([rows[tuple(row)] for row in tokens.tolist()])
            assert labels.tolist() == [LABELS[i % 32] for i in seen[-1]]
            assert len(set(labels.tolist())) > 1
    first, second = sum(seen[:8], []), sum(seen[8:], [])
    assert sorted(first) == sorted(second) == list(range(64)) and first != second
    state = checkpoints.load_checkpoint(tmp_path / "run" / "transformer.pt")
    assert state["settings"]["tokenizer"] == checkpoints.model_fingerprint(tokenizer)
    assert not tokenizer.training


def test_small_gradients_survive_float16(monkeypatch, tmp_path):
    """Without a factor on the loss, they would be rounded to zero."""
    spy(monkeypatch, m5, "token_losses", lambda found, _: (1e-7 * found[0], found[1]))
    norms = []
    for precision in ("float32", "float16"):
        _, entries = train("transformer", tmp_path / precision, precision=precision, steps=3)
        norms.append([e["grad"] for e in entries])
    assert norms[1] == pytest.approx(norms[0], rel=0.1)


@pytest.mark.parametrize("stage, changes", [
    ("tokenizer", dict(adversarial=1.0, flip=True, accumulate=2)),
    ("tokenizer", dict(learn="gradient", optimizer="adamw", precision="bfloat16")),
    ("transformer", dict(precision="float16", drop_path=0.2, accumulate=2))])
def test_a_stage_that_was_stopped_goes_on_bit_for_bit(monkeypatch, tmp_path, stage, changes):
    """With a critic, random flips and dropout, and the factor of float16."""
    monkeypatch.setattr(perceptual, "start_late", lambda progress: 1.0)
    train(stage, tmp_path / "straight", **changes)
    with monkeypatch.context() as patch:
        patch.setattr(distributed, "stop_requested", lambda step: 15 * (step == 5))
        with pytest.raises(SystemExit, match="143"):
            train(stage, tmp_path / "stopped", **changes)
    train(stage, tmp_path / "stopped", **changes)
    straight, stopped = (checkpoints.load_checkpoint(tmp_path / name / f"{stage}.pt")
                         for name in ("straight", "stopped"))
    assert stopped["step"] == 10 and same(straight, stopped)
    assert log_of(tmp_path / "straight") == log_of(tmp_path / "stopped")
    assert ("critic" in straight) == ("adversarial" in changes)


@pytest.mark.parametrize("stage, owner, name", [
    ("tokenizer", m2.MultiScaleVQVAE, "forward"), ("transformer", m5, "token_losses")])
def test_ten_steps_in_a_row_with_infinite_gradients_end_the_run_and_harm_nothing(
        monkeypatch, tmp_path, stage, owner, name):
    def spoil(result, calls):
        if len(calls) in (2, 3, 4) or len(calls) > 5:      # the first three are skipped
            result[0].register_hook(lambda gradient: gradient * torch.inf)
        return result
    calls = spy(monkeypatch, owner, name, spoil)
    with pytest.raises(BadInput, match="ten steps in a row.*learning rate.*--fresh"):
        train(stage, tmp_path, steps=99, tokenizer_steps=99, save_every=1)
    weights = checkpoints.load_checkpoint(tmp_path / f"{stage}.pt")["model"].values()
    assert len(calls) == 15 and all(weight.isfinite().all() for weight in weights)


# -- The same run again ----------------------------------------------------------------------------

def test_a_refused_command_names_the_setting_encodes_nothing_and_harms_no_run(
        refused, cli, tiny, tmp_path, monkeypatch):
    def offline():
        raise BadInput("could not download")
    monkeypatch.setattr(m5.perceptual, "load_perceptual", offline)
    run = shutil.copytree(tiny.folder, tmp_path / "run", ignore=lambda *_: ["settings.json"])
    for path in run.glob("*.npy"):
        path.unlink()
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    for change, words in (("--lr 0.5", "lr 0.0015 -> 0.5"), ("--steps 25", "steps 24 -> 25"),
                          ("--tokenizer-lr 0.5", "tokenizer_lr"), ("--views 3", "--fresh"),
                          ("--precision bfloat16", "precision"),
                          ("--perceptual 1 --fresh", "download")):
        assert words in refused(SCRIPT, *tiny.options, "--out", run, *change.split())
        (run / "settings.json").unlink(missing_ok=True)
        assert before == {path.name: path.read_bytes() for path in run.iterdir()}
    # The precision that was refused is not the run's, and some settings may change.
    result = cli(SCRIPT, *tiny.options, "--out", run, "--precision", "auto", "--log-every", 7)
    assert result.out.count("resuming at step 24") == 2, result.err


def test_a_checkpoint_that_lacks_a_setting_has_its_default_and_a_damaged_one_is_refused(
        refused, cli, tiny, tmp_path):
    run = shutil.copytree(tiny.folder, tmp_path / "run")
    options = [*tiny.options, "--out", run]
    state = checkpoints.load_checkpoint(run / "transformer.pt")
    for setting in ("clip", "seed", "label_dropout"):
        state["settings"].pop(setting)
        state["config"].pop(setting, None)
    torch.save(state, run / "transformer.pt")
    assert cli(SCRIPT, *options).out.count("resuming at step 24") == 2
    assert "clip 2.0 -> 3.0" in refused(SCRIPT, *options, "--stage", "transformer", "--clip", 3)
    state["model"]["start"] = torch.zeros(3)               # readable, but of another shape
    torch.save(state, run / "transformer.pt")
    assert "transformer.pt is damaged" in refused(SCRIPT, *options)


@pytest.mark.parametrize("stage, left", [("tokenizer", dict(tokenizer=2)),
                                         ("transformer", dict(tokenizer=24, transformer=2))])
def test_fresh_trains_its_stage_anew_and_forgets_what_depends_on_it(
        cli, tiny, tmp_path, stage, left):
    run = shutil.copytree(tiny.folder, tmp_path / "run")
    cli(SCRIPT, *tiny.options, "--out", run, "--stage", stage, "--fresh", "--steps", 2,
        "--tokenizer-steps", 2)
    assert left == {p.stem: checkpoints.load_checkpoint(p)["step"] for p in run.glob("*.pt")}


def test_stage_2_trains_on_a_tokenizer_from_a_file_and_then_no_longer_needs_it(
        cli, refused, tiny, tmp_path):
    """The file has the layout of vae_ch160v4096z32.pth: 64 px, maps of 1, 2, 3 and 4."""
    keys = json.loads((ROOT / "tests" / "golden" / "tiny_keys.json").read_text())
    weights = {name: 0.1 * torch.randn(shape) for name, shape in keys["plain"]["vae"].items()}
    torch.save(weights, tmp_path / "vae.pth")
    options = [*"--depth 1 --width 16 --heads 2 --batch-size 4 --workers 0 --steps 3 --device cpu "
               "--precision float32 --stage transformer".split(), "--dataset", tiny.pictures]
    file = ["--image-size", 64, "--out", "run", "--tokenizer-file", "vae.pth"]
    assert "last scale" in refused(SCRIPT, *options, *file, "--image-size", 48)
    result = cli(SCRIPT, *options, *file)
    assert result.status == 0, result.err
    tokenizer, _ = m5.load_tokenizer("run/tokenizer.pt")
    assert torch.equal(tokenizer.quantizer.codebook, weights["quantize.embedding.weight"])
    assert tokenizer.config.scales == (1, 2, 3, 4)
    assert "resuming at step 3" in cli(SCRIPT, *options, "--out", "run").out
    state = checkpoints.load_checkpoint(tiny.folder / "tokenizer.pt")
    Path("half").mkdir()
    torch.save(state | {"step": 7}, "half/tokenizer.pt")   # was it stopped on purpose?
    assert "trained for 7 of 24 steps" in refused(SCRIPT, *options, "--out", "half")
    another = ["--tokenizer-file", "half/tokenizer.pt"]
    assert "choose a new folder" in refused(SCRIPT, *options, *another, "--out", "run")
    assert cli(SCRIPT, *options, *another, "--out", "new").status == 0
    line = refused(SCRIPT, *tiny.options, "--out", "new")  # it was trained with settings unknown
    assert "--tokenizer-file" in line and "--stage transformer" in line
