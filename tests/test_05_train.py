"""Chapter 5: settings, both loops, what they log, and when a run resumes. Graders check the
loss of a token, the order of the images and the adversarial weight."""
import os
import shutil
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, layout, log_of, same
from hypothesis import given
from hypothesis import strategies as st

from data import imagenet
from engine import BadInput, checkpoints, distributed, perceptual, released

m2, m4, m5 = map(import_module, ("02_multiscale_vqvae", "04_var_transformer", "05_train"))
SCRIPT = "05_train.py"
SMALL = ("--stage transformer --depth 1 --width 16 --heads 2 --batch-size 4 --workers 0 "
         "--device cpu --precision float32").split()


@pytest.mark.parametrize("name", m5.PRESETS)
def test_a_typed_option_wins_over_the_preset_and_the_preset_over_the_default(name):
    settings = m5.read_settings(["--preset", name, "--views", "3"])
    assert (settings.views, settings.seed) == (3, 0)
    assert settings.cfg == m5.PRESETS[name].get("cfg", 0.5)
    assert settings.out == os.path.join("out", name)


@pytest.mark.parametrize("side, scales", [
    (32, (1, 2, 3, 4, 6, 8)), (64, (1, 2, 3, 4, 6, 8)), (128, released.SCALES[680]),
    (256, released.SCALES[680]), (512, released.SCALES[2240])])
def test_the_token_maps_follow_from_the_image_size(side, scales):
    assert m5.read_settings(["--image-size", str(side)]).scales == scales


@pytest.mark.parametrize("depth, side, batch, epochs, rate, last_decay, final", [
    (16, 256, 768, 200, 1e-4, 0.05, 0.1), (20, 256, 768, 250, 1e-4, 0.05, 0.1),
    (24, 256, 768, 350, 8e-5, 0.05, 0.01), (30, 256, 1024, 350, 8e-5, 0.08, 0.01),
    (36, 512, 768, 350, 8e-5, 0.08, 0.01)])
def test_the_imagenet_recipe_is_that_of_the_original(
        depth, side, batch, epochs, rate, last_decay, final):
    words = ["--dataset", "imagenet", "--depth", str(depth)]
    found = m5.read_settings(words)
    assert (found.batch_size, found.epochs, found.optimizer) == (batch, epochs, "adamw")
    assert found.lr == pytest.approx(rate * batch / 256)
    assert (found.weight_decay, found.final_weight_decay) == (0.05, last_decay)
    assert (found.final_lr, found.clip, found.image_size) == (final, 2.0, side)
    assert found.scales == released.SCALES[680 if side == 256 else 2240]
    var = m5.config_of(m4.VARConfig, found, num_classes=1000)
    assert (var.width, var.heads, var.shared_adaln) == (64 * depth, depth, depth == 36)
    assert var.drop_path == pytest.approx(0.1 * depth / 24)
    found = m5.read_settings([*words, "--lr", "1", "--steps", "7"])
    assert (found.lr, found.steps, found.epochs) == (1, 7, 0)


@given(progress=st.floats(0, 1), final=st.floats(0, 1))
def test_the_learning_rate_warms_up_stays_flat_and_falls_along_a_line(progress, final):
    wanted = np.interp(progress, [0, 0.02, 0.05, 1], [0.005, 1, 1, final])
    assert m5.learning_rate(progress, final) == pytest.approx(wanted, abs=1e-9)


@pytest.mark.parametrize("options, word", [
    ("--step 3", "step"), ("--lr nan", "lr"), ("--batch-size 0", "at least 1"),
    ("--stage three", "'three'"), ("--dataset nosuch", "'nosuch'"),
    ("--preset nosuch", "nosuch"), ("--classes ant dog", "'dog'"), ("--heads 3", "heads"),
    ("--accumulate 3", "multiples of 3"), ("--tokenizer-file nowhere.pth", "nowhere.pth"),
    ("--stage transformer", "--stage tokenizer"), ("--device auto --gpus 4", "--gpus 4")])
def test_a_wrong_option_is_one_line_and_leaves_no_trace(refused, tiny, options, word):
    assert word in refused(SCRIPT, *tiny.options, "--out", "run", *options.split())
    assert not Path("run").exists()


def test_the_imagenet_command_as_typed_says_where_the_images_belong(
        refused, monkeypatch, tmp_path):
    monkeypatch.setattr(imagenet, "DEFAULT_FOLDER", tmp_path / "data" / "imagenet")
    line = refused(SCRIPT, "--dataset", "imagenet", "--gpus", 8)
    assert str(Path("data", "imagenet")) in line and "--data-dir" in line


def test_one_command_trains_both_stages(tiny):
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
    # The transformer alone, without the tokenizer; a row for each class and one for none.
    state = torch.load(tiny.folder / "transformer.pt", weights_only=True)
    assert state["class_names"] == ["ant", "bee", "cat"]
    assert len(state["model"]["class_embed.weight"]) == 3 + 1
    model = m4.VAR(m4.VARConfig(**state["config"]))
    assert set(state["model"]) == set(model.state_dict())


def test_a_flat_folder_makes_an_unconditional_model_and_exports_load_as_shipped_ones_do(
        cli, tiny, tmp_path):
    folder = shutil.copytree(tiny.pictures / "ant", tmp_path / "flat")
    result = cli(SCRIPT, *tiny.options, "--dataset", folder, "--tokenizer-steps", 2,
                 "--steps", 2, "--quantizer", "lfq", "--precision", "bfloat16",
                 "--activation-checkpointing", "--out", "run", "--export", "both.pt")
    assert result.status == 0, result.err
    assert np.isfinite([e["loss"] for e in log_of(Path("run")) if "loss" in e]).all()
    for path in (*ROOT.glob("data/pretrained/*.pt"), "both.pt"):
        for load in (m5.load_tokenizer, m5.load_transformer):
            model, about = load(path)
            assert not model.training and "model" not in about
            assert not any(p.requires_grad for p in model.parameters())
    assert about["class_names"] == ["flat"] and model.config.num_classes == 1


def test_epochs_become_steps_and_some_classes_train_stage_2_on_the_tokenizer_of_all(
        cli, refused, tiny, tmp_path):
    """The tokenizer knows the image size."""
    run = shutil.copytree(tiny.folder, tmp_path / "run")
    (run / "transformer.pt").unlink()
    words = [*SMALL, "--epochs", 2, "--out", run, "--dataset", tiny.pictures, "--classes"]
    out = cli(SCRIPT, *words, "cat", "bee").out
    assert "34 images to train on, 2 held out, 2 classes" in out
    state = checkpoints.load_checkpoint(run / "transformer.pt")
    assert state["class_names"] == ["bee", "cat"] and state["config"]["num_classes"] == 2
    assert "resuming at step 17" in cli(SCRIPT, *words, "Bee", "2").out
    assert "classes" in refused(SCRIPT, *words, "2")       # the first two are other classes


NOISE = np.random.default_rng(0).integers(0, 255, (32, 16, 16, 3), dtype=np.uint8)
TOKENS = list(np.random.default_rng(0).integers(0, 16, (2, 32, 21), dtype=np.uint16))
LABELS = np.arange(32) // 11                               # sorted, as in class folders


def train(stage, out, **changes):
    """One stage, without a data set. -> the tokenizer, the entries of steps in the log"""
    settings = m5.read_settings([*TINY, "--out", str(out)])
    sizes = dict(tokenizer_batch_size=8, batch_size=8, tokenizer_steps=10, steps=10)
    vars(settings).update(sizes | changes)
    out.mkdir(exist_ok=True)
    torch.manual_seed(0)
    tokenizer = m2.MultiScaleVQVAE(m5.config_of(m2.TokenizerConfig, settings))
    tokenizer.quantizer.initialised = torch.tensor(True)   # codes need no data to start
    names, cpu = ["a", "b", "c"], torch.device("cpu")
    if stage == "tokenizer":
        splits = {"train": (NOISE, LABELS), "test": (NOISE[:4], LABELS[:4])}
        m5.train_tokenizer(settings, tokenizer, splits, names, cpu)
    else:
        tokenizer.eval().requires_grad_(False)
        var = m4.VAR(m5.config_of(m4.VARConfig, settings, num_classes=3))
        data = [(TOKENS, LABELS), ([TOKENS[0][:20]], LABELS[:20])]
        m5.train_transformer(settings, var, tokenizer, lambda: data, names, cpu)
    return tokenizer, [e for e in log_of(out) if "held_out" not in e]


def spy(monkeypatch, owner, name, change=lambda result, calls: result):
    """Record calls of a function. change(result, calls) -> what it returns instead"""
    calls, real = [], getattr(owner, name)

    def wrapper(*args, **options):
        result = real(*args, **options)
        calls.append((args, result))
        return change(result, calls)
    monkeypatch.setattr(owner, name, wrapper)
    return calls


def test_stage_1_adds_the_four_terms_and_logs_their_mean(monkeypatch, tmp_path):
    lpips = torch.nn.Module()
    lpips.forward = lambda decoded, image: torch.tensor([6.0, 8.0])
    monkeypatch.setattr(perceptual, "load_perceptual", lambda: lpips)
    losses_of_critic = torch.tensor(100.0), 0.0
    monkeypatch.setattr(perceptual, "adversarial_losses", lambda *_: losses_of_critic)
    forward = spy(monkeypatch, m2.MultiScaleVQVAE, "forward")
    loaded = spy(monkeypatch, m5, "to_float")
    _, entries = train("tokenizer", tmp_path, perceptual=3.0, adversarial=0.5,
                       flip=True, accumulate=4, quantizer="lfq")
    for step, entry in enumerate(entries):
        losses, db = [], []
        for (_, image), (decoded, _, parts) in forward[4 * step:4 * step + 4]:
            error, vq, extra = (float(x.detach()) for x in parts.values())
            losses.append(error + 3 * 7 + 0.25 * vq + extra)
            errors = (decoded.detach().clamp(-1, 1) - image).square().mean((1, 2, 3))
            db += (10 * (4 / errors).log10()).tolist()     # of each image
        late = min(max(0, (step / 10 - 0.2) / 0.2), 1)     # the critic joins after a fifth
        assert entry["loss"] == pytest.approx(np.mean(losses) + 0.5 * late * 100, rel=1e-5)
        assert entry["psnr"] == pytest.approx(np.mean(db), abs=1e-3)
    shown = torch.cat([image for (_, image), _ in forward])
    image = torch.cat([result for _, result in loaded])
    plain, mirrored = ((shown == x).flatten(1).all(1) for x in (image, image.flip(3)))
    assert (plain ^ mirrored).all() and 0.3 < mirrored.float().mean() < 0.7


@pytest.mark.parametrize("stage", ["tokenizer", "transformer"])
def test_a_batch_in_parts_has_the_loss_and_the_gradient_of_the_whole(tmp_path, stage):
    found = []
    for parts in (1, 2, 8):
        _, entries = train(stage, tmp_path / str(parts), accumulate=parts, learn="gradient",
                           label_dropout=0.0, steps=2, tokenizer_steps=2)
        found.append([entries[0]["loss"], entries[0]["grad"], entries[1]["loss"]])
    assert np.allclose(found, found[0], rtol=1e-4)


def test_stage_2_is_shown_each_view_once_with_its_label(monkeypatch, tmp_path):
    """A model that sees one class after the other learns nothing. 2 views of 32 images,
    8 a step; 20 images are held out."""
    calls = spy(monkeypatch, m5, "token_losses")
    tokenizer, _ = train("transformer", tmp_path, steps=8)
    rows = {tuple(row): i for i, row in enumerate(np.concatenate(TOKENS).tolist())}
    seen = []
    for (_, _, tokens, labels), _ in calls:
        if len(labels) == 8:
            shown = [rows[tuple(row)] for row in tokens.tolist()]
            assert labels.tolist() == [LABELS[i % 32] for i in shown]
            assert len(set(labels.tolist())) > 1
            seen += shown
    assert sorted(seen) == list(range(64))
    state = checkpoints.load_checkpoint(tmp_path / "transformer.pt")
    assert state["settings"]["tokenizer"] == checkpoints.model_fingerprint(tokenizer)


@pytest.mark.parametrize("stage, changes", [
    ("tokenizer", dict(adversarial=1.0, flip=True, accumulate=2)),
    ("transformer", dict(precision="float16", drop_path=0.2, accumulate=2))])
def test_a_stopped_stage_goes_on_bit_for_bit(monkeypatch, tmp_path, stage, changes):
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


def test_a_refused_command_names_the_setting_encodes_nothing_and_harms_no_run(
        refused, cli, tiny, tmp_path, monkeypatch):
    """The run is older than --clip, which thus had its default."""
    def offline():
        raise BadInput("could not download")

    def contents():
        return {p: p.read_bytes() for p in run.iterdir() if p.suffix != ".json"}
    monkeypatch.setattr(m5.perceptual, "load_perceptual", offline)
    run = shutil.copytree(tiny.folder, tmp_path / "run")
    state = checkpoints.load_checkpoint(run / "transformer.pt")
    state["settings"].pop("clip")
    torch.save(state, run / "transformer.pt")
    for path in run.glob("*.npy"):
        path.unlink()
    options, before = [*tiny.options, "--out", run], contents()
    for change, words in (("--lr 0.5", "lr 0.0015 -> 0.5"),
                          ("--precision bfloat16", "float32"),
                          ("--stage transformer --clip 3", "clip 2.0 -> 3.0"),
                          ("--perceptual 1 --fresh", "download")):
        assert words in refused(SCRIPT, *options, *change.split())
        assert before == contents()
    # The precision that was refused is not the run's, and some settings may change.
    result = cli(SCRIPT, *options, "--precision", "auto", "--log-every", 7)
    assert result.out.count("resuming at step 24") == 2, result.err
    state["model"]["start"] = torch.zeros(3)               # readable, but of another shape
    torch.save(state, run / "transformer.pt")
    assert "transformer.pt is damaged" in refused(SCRIPT, *options)


@pytest.mark.parametrize("stage, left", [
    ("tokenizer", dict(tokenizer=2)), ("transformer", dict(tokenizer=24, transformer=2))])
def test_fresh_trains_its_stage_anew_and_forgets_what_depends_on_it(
        cli, tiny, tmp_path, stage, left):
    run = shutil.copytree(tiny.folder, tmp_path / "run")
    cli(SCRIPT, *tiny.options, "--out", run, "--stage", stage, "--fresh", "--steps", 2,
        "--tokenizer-steps", 2)
    found = {p.stem: checkpoints.load_checkpoint(p)["step"] for p in run.glob("*.pt")}
    assert found == left


def test_stage_2_trains_on_a_tokenizer_from_a_file_and_then_no_longer_needs_it(
        cli, refused, tiny):
    """The file has the layout of vae_ch160v4096z32.pth: 64 px, maps of 1, 2, 3 and 4."""
    weights, _, _ = layout()
    torch.save(weights, "vae.pth")
    options = [*SMALL, "--steps", 3, "--dataset", tiny.pictures]
    result = cli(SCRIPT, *options, "--out", "run", "--tokenizer-file", "vae.pth",
                 "--image-size", 64)
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
    assert "--stage transformer" in refused(SCRIPT, *tiny.options, "--out", "new")
