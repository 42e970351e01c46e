"""Chapter 5: settings, the training loop, resuming, many processes."""
import json
import os
import pickle
import re
import shutil
import signal
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import same, stage_of
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from data import batches, registry, shapes
from engine import BadInput, checkpoints, devices

m1, m2 = import_module("01_vq"), import_module("02_multiscale_vqvae")
m4, m5 = import_module("04_var_transformer"), import_module("05_train")
SCRIPT = "05_train.py"


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


# -- Settings --------------------------------------------------------------------------------------

def test_a_run_of_epochs_says_its_steps_and_resumes_where_there_are_as_many_pictures(cli, tiny,
                                                                                     tmp_path):
    """57 pictures in batches of 4: two epochs are 28 steps."""
    shutil.copytree(tiny.folder, tmp_path / "run")
    at = tiny.options.index("--steps")
    options = [*tiny.options[:at], *tiny.options[at + 2:], "--out", tmp_path / "run", "--fresh",
               "--stage", "transformer", "--set", "views=1", "epochs=2"]
    result = cli(SCRIPT, *options)
    assert result.status == 0 and "28 steps" in result.out and "2 epochs of 57" in result.out
    state = checkpoints.load_checkpoint(tmp_path / "run" / "transformer.pt")
    assert (state["step"], state["settings"]["steps"]) == (28, 28)
    again = cli(SCRIPT, *[x for x in options if x != "--fresh"])
    assert again.status == 0 and "trained for 28 steps" in again.out


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_cuda_without_a_gpu_is_refused(refused, tmp_path):
    assert "cuda" in refused(SCRIPT, "--device", "cuda", "--out", tmp_path / "run")


def test_float32_convolutions_of_a_gpu_are_not_rounded_to_19_bits():
    torch.backends.cudnn.allow_tf32 = True                 # torch's default
    devices.pick_device("cpu")
    assert not torch.backends.cudnn.allow_tf32


def test_an_empty_folder_and_a_file_are_refused(refused, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "note.txt").write_text("no picture")
    for name in ("empty", "note.txt"):
        refused(SCRIPT, "--dataset", tmp_path / name, "--out", tmp_path / "run", "--device", "cpu")


def test_the_real_script_prints_one_line_and_no_traceback(tmp_path, tiny):
    process = tiny.start(SCRIPT, "--dataset", "nosuch", "--device", "cpu", cwd=tmp_path)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 2 and err.count("\n") == 1 and "'nosuch'" in err


def test_other_settings_on_resume_are_refused_and_name_what_changed(refused, tiny, tmp_path):
    shutil.copytree(tiny.folder, tmp_path / "run")
    for change in ("--lr 0.5", "--tokenizer-lr 0.5", "--seed 9", "--steps 25"):
        line = refused(SCRIPT, *tiny.options, "--out", tmp_path / "run", *change.split())
        assert change.split()[0].lstrip("-").replace("-", "_") in line and "--fresh" in line
    assert same(checkpoints.load_checkpoint(tmp_path / "run" / "transformer.pt"),
                checkpoints.load_checkpoint(tiny.folder / "transformer.pt")), "nothing may be lost"


# -- Which pictures, which learning rate -----------------------------------------------------------

@given(n=st.integers(1, 40), batch=st.integers(1, 60), seed=st.integers(0, 5))
def test_every_picture_comes_exactly_once_per_epoch(n, batch, seed):
    steps = -(-3 * n // batch)
    drawn = np.concatenate([batches.batch_indices(s, n, batch, seed) for s in range(steps)])
    assert len(drawn) == steps * batch and drawn.dtype.kind == "i"
    for epoch in range(3):
        assert sorted(drawn[epoch * n:(epoch + 1) * n]) == list(range(n))


@given(step=st.integers(0, 1000), n=st.integers(1, 50), batch=st.integers(1, 20))
def test_seed_and_step_alone_decide_the_pictures(step, n, batch):
    first = batches.batch_indices(step, n, batch, 3)
    batches.epoch_order.cache_clear()
    assert np.array_equal(first, batches.batch_indices(step, n, batch, 3))


def test_the_pictures_are_shuffled_differently_in_every_epoch_and_for_every_seed():
    epochs = [batches.batch_indices(e, 500, 500, seed) for seed in (0, 1) for e in range(3)]
    epochs.append(np.arange(500))
    for i, one in enumerate(epochs):
        for other in epochs[:i]:
            assert (one == other).mean() < 0.05
    assert abs(np.corrcoef(epochs[0], np.arange(500))[0, 1]) < 0.2


def test_the_training_loop_uses_the_shuffled_order(cli, tiny, tmp_path, monkeypatch):
    """What reaches the model, not what batch_indices says: class folders are sorted by class, and
    a model that sees one class after the other learns nothing."""
    seen, forward = [], m4.VAR.forward

    def spy(self, labels, inputs):
        if self.training:
            seen.append(labels.tolist())
        return forward(self, labels, inputs)
    monkeypatch.setattr(m4.VAR, "forward", spy)
    shutil.copytree(tiny.folder, tmp_path / "run")
    assert cli(SCRIPT, *tiny.options, "--stage", "transformer", "--fresh", "--out",
               tmp_path / "run").status == 0
    assert len(seen) == 24 and sum(len(set(labels)) > 1 for labels in seen) > 18
    assert len({tuple(labels) for labels in seen}) > 12


def test_optimizer_states_of_another_memory_layout_go_on_as_they_were():
    """Weights of convolutions lie channels last; states that were saved otherwise must not be
    walked through side by side with them."""
    torch.manual_seed(0)
    model = torch.nn.Conv2d(8, 4, 3).to(memory_format=torch.channels_last)
    saved = {"exp_avg": torch.randn(4, 8, 3, 3), "step": torch.tensor(3.0), "name": "x"}
    laid = {key: checkpoints.spread(value, model.weight) for key, value in saved.items()}
    assert same(laid, saved) and laid["exp_avg"].stride() == model.weight.stride()
    assert saved["exp_avg"].stride() != model.weight.stride()


def var_model():
    torch.manual_seed(0)
    return m4.VAR(m4.VARConfig(num_classes=3, scales=(1, 2, 4), vocab_size=16, latent_dim=4,
                               depth=2, width=16, heads=2))


# -- The loss of stage 2 ---------------------------------------------------------------------------

def test_the_loss_of_a_token_is_minus_the_log_of_its_softmax():
    """Each token has its own, in nats, against a slow loop in float64."""
    config = m2.TokenizerConfig(image_size=16, scales=(1, 2, 4), vocab_size=16, latent_dim=4,
                                channels=8)
    model, tokenizer = var_model().eval(), m2.MultiScaleVQVAE(config).eval()
    for p in model.parameters():                           # unlike tokens must be unlike likely
        p.data.add_(0.3 * torch.randn_like(p))
    tokens, labels = torch.randint(16, (3, 21)), torch.tensor([0, 2, 3])
    sizes = [1, 4, 16]
    stage = SimpleNamespace(tokenizer=tokenizer, sizes=sizes, run=SimpleNamespace(
        autocast=nullcontext))
    loss, right = m5.TransformerStage.per_token(stage, model, tokens, labels)
    logits = model(labels, tokenizer.teacher_inputs(list(tokens.split(sizes, 1))))
    logits = logits.detach().double().numpy()
    for b, t in np.ndindex(3, 21):
        row, code = logits[b, t], int(tokens[b, t])
        assert float(loss[b, t]) == pytest.approx(np.log(np.exp(row).sum()) - row[code], rel=1e-4)
        assert bool(right[b, t]) == (code == row.argmax())
    assert loss.shape == (3, 21) and loss.std() > 0.1
    text, numbers = m5.TransformerStage.describe(stage, loss.mean(0), 0.5)
    slow = [float(loss[:, a:b].mean()) for a, b in ((0, 1), (1, 5), (5, 21))]
    assert numbers["per_scale"] == pytest.approx(slow, rel=1e-4)
    assert text.startswith("per-scale " + " ".join(f"{x:.2f}" for x in slow))


# -- A whole run -----------------------------------------------------------------------------------

def test_the_same_command_trains_both_stages_and_makes_pictures(tiny):
    files = {path.name for path in tiny.folder.iterdir()}
    assert {"tokenizer.pt", "transformer.pt", "log.jsonl", "tokens_train.npy", "samples.png",
            "reconstructions.png"} <= files
    assert not any(name.endswith(".tmp") for name in files)
    assert tiny.stderr == ""
    steps = [e["step"] for e in log_of(tiny.folder) if e["stage"] == "transformer" and "loss" in e]
    assert steps == list(range(1, 25))
    entry = [e for e in log_of(tiny.folder) if "per_scale" in e][0]
    assert len(entry["per_scale"]) == 3 and abs(entry["loss"] - np.log(16)) < 0.1
    assert np.dot(entry["per_scale"], [1, 4, 16]) / 21 == pytest.approx(entry["loss"], rel=1e-4)


def test_both_stages_learn(tiny):
    entries = log_of(tiny.folder)
    for key, better in (("psnr", 1), ("loss", -1)):
        values = [e["held_out"][key] for e in entries if key in e.get("held_out", {})]
        assert len(values) >= 2 and better * (values[-1] - values[0]) > 0


def test_classes_come_from_the_data(tiny):
    state = checkpoints.load_checkpoint(tiny.folder / "transformer.pt")
    assert state["config"]["num_classes"] == 3 and state["class_names"] == ["ant", "bee", "cat"]
    assert len(state["model"]["class_embed.weight"]) == 4


def test_the_tokenizer_is_no_part_of_the_transformers_checkpoint(tiny):
    state = checkpoints.load_checkpoint(tiny.folder / "transformer.pt")
    assert set(state["model"]) == set(var_model().state_dict())
    words = ("encoder", "decoder", "quant", "phi", "codebook", "tokenizer")
    assert not [name for name in state["model"] if any(word in name for word in words)]
    count = sum(len(g["params"]) for o in state["optimizers"] for g in o["param_groups"])
    assert count == len(list(var_model().parameters()))


def test_the_tokenizer_is_frozen_in_stage_2(cli, tiny, tmp_path, monkeypatch):
    """No gradients, not a bit of its file changed, and after the cache is built no encoder."""
    shutil.copytree(tiny.folder, tmp_path / "run")
    before = (tmp_path / "run" / "tokenizer.pt").read_bytes()

    def encode(self, image):
        raise AssertionError("stage 2 called the encoder")
    monkeypatch.setattr(m2.MultiScaleVQVAE, "encode", encode)
    teacher_inputs = m2.MultiScaleVQVAE.teacher_inputs

    def spy(self, tokens):
        assert not self.training and not any(p.requires_grad for p in self.parameters())
        return teacher_inputs(self, tokens)
    monkeypatch.setattr(m2.MultiScaleVQVAE, "teacher_inputs", spy)
    result = cli(SCRIPT, *tiny.options, "--stage", "transformer", "--fresh", "--out",
                 tmp_path / "run")
    assert result.status == 0 and "resuming" not in result.out
    assert (tmp_path / "run" / "tokenizer.pt").read_bytes() == before
    assert same(checkpoints.load_checkpoint(tmp_path / "run" / "transformer.pt")["model"],
                checkpoints.load_checkpoint(tiny.folder / "transformer.pt")["model"])
    (call,) = result.started
    assert "06_sample_and_edit.py" in " ".join(call)


def test_loaded_models_are_frozen_and_in_eval_mode(tiny):
    for load, name in ((m5.load_tokenizer, "tokenizer.pt"),
                       (m5.load_transformer, "transformer.pt")):
        model, about = load(tiny.folder / name)
        assert not any(module.training for module in model.modules())
        assert not any(p.requires_grad for p in model.parameters())
        assert about["class_names"] == ["ant", "bee", "cat"] and "model" not in about
    with pytest.raises(BadInput, match="transformer"):
        m5.load_transformer(tiny.folder / "tokenizer.pt")
    with pytest.raises(BadInput, match="tokenizer"):
        m5.load_tokenizer(tiny.folder / "transformer.pt")


def test_the_same_command_again_has_nothing_to_do(cli, tiny, tmp_path):
    shutil.copytree(tiny.folder, tmp_path / "run")
    result = cli(SCRIPT, *tiny.options, "--out", tmp_path / "run")
    assert result.status == 0 and result.out.count("trained for 24 steps") == 2
    assert log_of(tmp_path / "run") == log_of(tiny.folder)


def test_a_flat_folder_trains_an_unconditional_model(cli, tiny, tmp_path):
    flat = tmp_path / "flat"
    flat.mkdir()
    for i, path in enumerate(sorted(tiny.pictures.glob("*/*.png"))):
        shutil.copy(path, flat / f"{i}.png")
    result = cli(SCRIPT, *tiny.options, "--dataset", flat, "--tokenizer-steps", 2, "--steps", 2,
                 "--out", tmp_path / "run")
    assert result.status == 0, result.err
    state = checkpoints.load_checkpoint(tmp_path / "run" / "transformer.pt")
    assert state["config"]["num_classes"] == 1 and state["class_names"] == ["flat"]


@pytest.mark.parametrize("options", ["--precision bfloat16", "--quantizer lfq",
                                     "--set learn=gradient", "--set residual=false scales=4",
                                     "--optimizer adamw --flip"])
def test_every_variant_trains_a_few_steps(cli, tiny, tmp_path, options):
    result = cli(SCRIPT, *tiny.options, "--tokenizer-steps", 2, "--steps", 2, *options.split(),
                 "--out", tmp_path / "run")
    assert result.status == 0, result.err
    entries = log_of(tmp_path / "run")
    assert len([e for e in entries if "loss" in e]) == 4
    assert all(np.isfinite(e["loss"]) for e in entries if "loss" in e)


def test_stage_2_alone_takes_the_picture_size_from_the_tokenizer(cli, tiny, tmp_path):
    """--stage transformer without repeating the tokenizer's sizes works, or says what to repeat."""
    (tmp_path / "run").mkdir()
    shutil.copy(tiny.folder / "tokenizer.pt", tmp_path / "run")
    result = cli(SCRIPT, "--dataset", tiny.pictures, "--stage", "transformer", "--steps", 1,
                 *"--depth 2 --set width=16 heads=2 --batch-size 4 --views 1 --workers 0".split(),
                 "--device", "cpu", "--precision", "float32", "--out", tmp_path / "run")
    assert result.status == 0 or result.status == 2 and result.err.count("\n") == 1


@pytest.fixture(scope="module")
def released_file(tmp_path_factory):
    """A small tokenizer in the layout of vae_ch160v4096z32.pth: 64 px, maps of 1, 2, 3 and 4."""
    keys = json.loads((Path(__file__).parent / "golden" / "tiny_keys.json").read_text())
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("released") / "vae.pth"
    torch.save({name: 0.1 * torch.randn(shape) for name, shape in keys["plain"]["vae"].items()},
               path)
    return path


ON_RELEASED = ("--stage transformer --image-size 64 --depth 1 --set width=16 heads=2 --views 2 "
               "--batch-size 4 --workers 0 --steps 6 --log-every 1 --device cpu "
               "--precision float32").split()


def test_stage_2_trains_on_the_released_tokenizer_resumes_and_is_sampled_from(
        cli, refused, tiny, tmp_path, released_file, monkeypatch):
    options = [*tiny.options[:2], *ON_RELEASED, "--tokenizer-file", released_file, "--out"]
    straight = cli(SCRIPT, *options, tmp_path / "straight")
    assert straight.status == 0, straight.err
    weights = torch.load(released_file, weights_only=True)
    tokenizer, about = m5.load_tokenizer(tmp_path / "straight" / "tokenizer.pt")
    assert torch.equal(tokenizer.quantizer.codebook, weights["quantize.embedding.weight"])
    assert torch.equal(tokenizer.decoder.conv_out.weight, weights["decoder.conv_out.weight"])
    assert tokenizer.config.scales == (1, 2, 3, 4) and about["class_names"] == ["ant", "bee", "cat"]
    images, *_ = registry.load_data(tiny.options[1], "test", 64)
    image = batches.to_float(batches.sample_of(images, len(images)))
    cache = np.load(tmp_path / "straight" / "tokens_test.npy")[0]
    assert np.array_equal(cache, torch.cat(tokenizer.image_to_tokens(image), 1).numpy())

    report = m5.report                                     # stopped at step 3, and resumed

    def stop(run, stage, now, *rest):
        report(run, stage, now, *rest)
        if now == 3:
            os.kill(os.getpid(), signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(m5, "report", stop)
        assert cli(SCRIPT, *options, tmp_path / "run").status == 143
    again = cli(SCRIPT, *[x for x in options if x not in ("--tokenizer-file", released_file)],
                tmp_path / "run")
    assert again.status == 0 and "transformer: going on at step 3" in again.out, again.err
    assert same(*[checkpoints.load_checkpoint(tmp_path / name / "transformer.pt")
                  for name in ("straight", "run")])
    sampled = cli("06_sample_and_edit.py", "--run", tmp_path / "run", "--task", "sample", "--n", 2,
                  "--classes", "bee", "--device", "cpu", "--out", tmp_path / "made")
    assert sampled.status == 0 and (tmp_path / "made" / "samples.png").exists(), sampled.err

    other = {**weights, "quantize.embedding.weight": 1 + weights["quantize.embedding.weight"]}
    torch.save({"trainer": {"vae_local": other}}, tmp_path / "other.pth")
    line = refused(SCRIPT, *options[:-1], "--tokenizer-file", tmp_path / "other.pth", "--out",
                   tmp_path / "run")
    assert "another tokenizer" in line and "--fresh" in line
    result = cli(SCRIPT, *options[:-1], "--tokenizer-file", tmp_path / "other.pth", "--fresh",
                 "--out", tmp_path / "run")
    assert result.status == 0, result.err
    tokenizer, _ = m5.load_tokenizer(tmp_path / "run" / "tokenizer.pt")
    assert torch.equal(tokenizer.quantizer.codebook, other["quantize.embedding.weight"])


def test_stage_2_trains_on_the_tokenizer_of_another_run(cli, tiny, tmp_path):
    result = cli(SCRIPT, *tiny.options[:2], *ON_RELEASED, "--tokenizer-file",
                 tiny.folder / "tokenizer.pt", "--steps", 1, "--out", tmp_path / "run")
    assert result.status == 0, result.err
    mine, theirs = (checkpoints.load_checkpoint(folder / "tokenizer.pt")
                    for folder in (tmp_path / "run", tiny.folder))
    assert same(mine["model"], theirs["model"]) and same(mine["config"], theirs["config"])


@pytest.mark.parametrize("options, words", [
    ("--stage all", "--stage transformer"), ("--tokenizer-file nowhere.pth", "nowhere.pth"),
    ("--image-size 48", "scale")])
def test_a_tokenizer_file_that_cannot_serve_is_one_line(refused, tiny, tmp_path, released_file,
                                                       options, words):
    line = refused(SCRIPT, *tiny.options[:2], *ON_RELEASED, "--tokenizer-file", released_file,
                   *options.split(), "--out", tmp_path / "run")
    assert words in line and not (tmp_path / "run").exists()


def test_data_that_lies_on_the_device_trains_the_same(cli, tiny, tmp_path, monkeypatch):
    """What a GPU does with small data, here with tensors on the CPU."""
    monkeypatch.setitem(shapes.DEFAULT_COUNT, "train", 20)
    monkeypatch.setitem(shapes.DEFAULT_COUNT, "test", 20)
    options = [*tiny.options[2:], "--dataset", "shapes", "--tokenizer-steps", 3, "--steps", 3]
    assert cli(SCRIPT, *options, "--out", tmp_path / "one").status == 0
    held, move = [], m5.move_small_arrays_to_gpu

    def pretend(arrays, device):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.Tensor, "to", lambda tensor, device: tensor)
            held.extend(found := move(arrays, torch.device("cuda")))
        return found
    monkeypatch.setattr(m5, "move_small_arrays_to_gpu", pretend)
    assert cli(SCRIPT, *options, "--out", tmp_path / "two").status == 0
    assert [x.dtype for x in held if torch.is_tensor(x)] == [
        torch.uint8, torch.int32, torch.int64, torch.int32, torch.int64] and len(held) == 5
    for name in ("tokenizer.pt", "transformer.pt"):
        one, two = (checkpoints.load_checkpoint(tmp_path / run / name) for run in ("one", "two"))
        assert same(one["model"], two["model"])
    assert log_of(tmp_path / "one") == log_of(tmp_path / "two")


# -- Steps that must not count ---------------------------------------------------------------------

class Waits(TorchDispatchMode):
    """Counts what makes the program wait for a GPU: a look at a number, a shape that depends on
    numbers, torch.multinomial's check of its weights."""
    names = "_local_scalar_dense bincount nonzero multinomial masked_select _unique2 equal"
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().split("::")[1].split(".")[0]
        index = args[1] if name in ("index", "index_put_", "index_put") else ()
        masked = any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in index)
        self.count += name in self.names.split() or masked
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind, settings", [
    ("transformer", {}), ("transformer", dict(optimizer="adamw", accumulate=2)),
    ("tokenizer", dict(flip=True)), ("tokenizer", dict(adversarial=1.0, picture_loss="l1")),
    ("tokenizer", dict(learn="gradient"))])
def test_a_training_step_does_not_make_a_gpu_wait(kind, settings):
    stage = stage_of(kind, **{"learn": "ema", **settings})
    batches_ = stage.batches(0)
    m5.train_step(stage, stage.model, next(batches_), 0.9)     # places the codes on the data
    batch = next(batches_)
    with Waits() as waits:
        m5.train_step(stage, stage.model, batch, 0.9)
    assert waits.count == len(stage.optimizers), "a CPU looks whether to skip the step, no more"
    with Waits() as waits:
        (torch.ones(3)[torch.ones(3) > 0].sum() > 1).item()
    assert waits.count == 2, "this test would notice"


@pytest.fixture
def spoilt(monkeypatch):
    """spoilt(bad) makes the training steps s with bad(s) yield nan. -> list of the steps seen"""
    forward, seen = m4.VAR.forward, []

    def spoil(bad):
        def broken(self, labels, inputs):
            logits = forward(self, labels, inputs)
            if self.training:
                seen.append(len(seen))
                logits = logits * (float("nan") if bad(seen[-1]) else 1.0)
            return logits
        monkeypatch.setattr(m4.VAR, "forward", broken)
        return seen
    return spoil


def test_a_step_that_is_not_finite_changes_no_weight(cli, tiny, tmp_path, spoilt):
    shutil.copytree(tiny.folder, tmp_path / "run")
    spoilt(lambda step: step == 3)
    result = cli(SCRIPT, *tiny.options, "--stage", "transformer", "--fresh", "--steps", 4,
                 "--out", tmp_path / "run")
    assert result.status == 0, result.err
    spoilt_run = checkpoints.load_checkpoint(tmp_path / "run" / "transformer.pt")
    assert all(v.isfinite().all() for v in spoilt_run["model"].values())
    count = [s["step"] for s in spoilt_run["optimizers"][0]["state"].values()]
    assert all(int(steps) == 3 for steps in count), "three steps counted, the fourth was skipped"


def test_ten_steps_in_a_row_that_are_not_finite_stop_the_run_with_one_line(
        refused, tiny, tmp_path, spoilt):
    shutil.copytree(tiny.folder, tmp_path / "run")
    seen = spoilt(lambda step: step >= 5)
    line = refused(SCRIPT, *tiny.options, "--stage", "transformer", "--fresh", "--out",
                   tmp_path / "run")
    assert "finite" in line and "learning rate" in line and len(seen) == 15
    kept = checkpoints.load_checkpoint(tmp_path / "run" / "transformer.pt")["model"]
    assert all(v.isfinite().all() for v in kept.values())


def test_scattered_bad_steps_do_not_stop_a_run(cli, tiny, tmp_path, spoilt):
    shutil.copytree(tiny.folder, tmp_path / "run")
    spoilt(lambda step: step % 2 == 1)
    assert cli(SCRIPT, *tiny.options, "--stage", "transformer", "--fresh", "--out",
               tmp_path / "run").status == 0


# -- Interrupted and resumed -----------------------------------------------------------------------

def wait_for(process, word):
    """Read lines until one begins with `word`; -> all lines read"""
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith(word):
            return lines
    raise AssertionError("".join(lines) + process.stderr.read())


def test_killed_and_stopped_runs_go_on_bit_for_bit(cli, tiny, tmp_path):
    run = tmp_path / "run"
    process = tiny.start(SCRIPT, *tiny.options, "--out", run, cwd=tmp_path)
    wait_for(process, "tokenizer 12/24")
    process.kill()                                         # no chance to save anything
    process.communicate()
    step = checkpoints.load_checkpoint(run / "tokenizer.pt")["step"]
    assert 10 <= step < 24, "it was to be killed on the way"

    process = tiny.start(SCRIPT, *tiny.options, "--out", run, cwd=tmp_path)
    lines = wait_for(process, "transformer 7/24")
    assert f"tokenizer: resuming at step {step}\n" in lines
    process.send_signal(signal.SIGTERM)                    # saves first
    out, err = process.communicate()
    assert process.returncode == 128 + signal.SIGTERM and err == ""
    step = checkpoints.load_checkpoint(run / "transformer.pt")["step"]
    assert 7 <= step < 24 and re.search(rf"stopped .*at step {step} ", out)

    result = cli(SCRIPT, *tiny.options, "--out", run)
    assert result.status == 0 and f"transformer: resuming at step {step}" in result.out
    for name in ("tokenizer.pt", "transformer.pt"):
        straight, resumed = (checkpoints.load_checkpoint(f / name) for f in (tiny.folder, run))
        for key in ("model", "optimizers", "step", "config"):
            assert same(straight[key], resumed[key]), (name, key)
    assert log_of(run) == log_of(tiny.folder)


def test_a_log_line_cut_short_by_a_crash_does_not_stop_the_resume(cli, tiny, tmp_path):
    shutil.copytree(tiny.folder, tmp_path / "run")
    with open(tmp_path / "run" / "log.jsonl", "a") as file:
        file.write('{"stage": "transf')
    result = cli(SCRIPT, *tiny.options, "--out", tmp_path / "run")
    assert result.status == 0, result.err
    assert log_of(tmp_path / "run") == log_of(tiny.folder)


def test_a_truncated_checkpoint_is_refused_in_one_line(refused, tiny, tmp_path):
    shutil.copytree(tiny.folder, tmp_path / "run")
    path = tmp_path / "run" / "tokenizer.pt"
    path.write_bytes(path.read_bytes()[:5000])
    assert "tokenizer.pt" in refused(SCRIPT, *tiny.options, "--out", tmp_path / "run")


# -- Many processes --------------------------------------------------------------------------------

def test_two_processes_train_as_one_does_and_only_one_writes(cli, tiny, tmp_path):
    """Stage 2 on the same global batches: same logged loss, same cached tokens."""
    options = [*tiny.options, *"--set label_dropout=0 drop_path=0 phis=3".split(),
               "--tokenizer-steps", 2, "--steps", 6]
    process = tiny.start(SCRIPT, *options, "--gpus", 2, "--out", tmp_path / "two", cwd=tmp_path)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    (tmp_path / "one").mkdir()
    shutil.copy(tmp_path / "two" / "tokenizer.pt", tmp_path / "one")
    result = cli(SCRIPT, *options, "--stage", "transformer", "--out", tmp_path / "one")
    assert result.status == 0, result.err
    two, one = ([e for e in log_of(tmp_path / name) if e["stage"] == "transformer"]
                for name in ("two", "one"))
    assert [e["step"] for e in two] == [e["step"] for e in one]
    for a, b in zip(two, one):
        assert a.keys() == b.keys()
        a, b = a.get("held_out", a), b.get("held_out", b)
        for key in {"loss", "per_scale", "right", "grad"} & b.keys():
            assert a[key] == pytest.approx(b[key], rel=2e-4, abs=1e-5), key
    assert out.count("transformer 6/6") == 1
    assert np.array_equal(np.load(tmp_path / "two" / "tokens_train.npy"),
                          np.load(tmp_path / "one" / "tokens_train.npy"))


def test_two_processes_train_a_tokenizer_with_fewer_scales_than_phis(tiny, tmp_path):
    """Three scales use three of the four phis: one has no gradient, and that is fine."""
    process = tiny.start(SCRIPT, *tiny.options, "--gpus", 2, "--stage", "tokenizer",
                         "--tokenizer-steps", 3, "--out", tmp_path / "run", cwd=tmp_path)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-2000:]
    assert "tokenizer 3/3" in out


def train_rank(rank, folder, options):
    """One of two processes that train a tokenizer; it notes all buffers after every step."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE="2")
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    observe, update = m1.VectorQuantizer.observe, m1.VectorQuantizer.update
    tokens, buffers, revived = [], [], []

    def spy(self, groups, indices):
        observe(self, groups, indices)
        tokens.append([idx.flatten() for idx in indices])

    def spy_on_update(self, accepted):
        self.decay, before = 0.7, self.hits.clone()        # forgets soon, so codes fall out of use
        update(self, accepted)
        revived.append(int(((self.hits == 1) & (before != 1)).sum()))
        buffers.append({name: value.clone() for name, value in self.state_dict().items()})
    m1.VectorQuantizer.observe, m1.VectorQuantizer.update = spy, spy_on_update
    m5.train_all(*m5.read_settings([*options, "--out", f"{folder}/run"]))
    torch.save(dict(tokens=tokens, buffers=buffers, revived=revived), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_have_one_codebook_and_count_its_usage_together(tiny, tmp_path):
    options = [*tiny.options, *"--stage tokenizer --tokenizer-steps 20 --vocab-size 64 "
               "--set phis=3 --log-every 5".split()]
    torch.multiprocessing.spawn(train_rank, (str(tmp_path), options), nprocs=2)
    one, two = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert sum(one["revived"]) > 20 and not same(one["tokens"], two["tokens"])
    assert set(one["buffers"][0]) == {"codebook", "hits", "sums", "initialised"}
    for step in range(20):
        assert same(one["buffers"][step], two["buffers"][step]), step
    entries = [e for e in log_of(tmp_path / "run") if "held_out" not in e]
    assert [e["step"] for e in entries] == [5, 10, 15, 20]
    for entry in entries:                                  # of five steps and of both processes
        steps = [process["tokens"][step] for process in (one, two)
                 for step in range(entry["step"] - 5, entry["step"])]
        scales = [torch.cat(parts) for parts in zip(*steps)]
        used, perplexity = zip(*[m1.usage(idx, 64) for idx in [*scales, torch.cat(scales)]])
        assert [*entry["used"], entry["used_overall"]] == pytest.approx(used)
        assert [*entry["perplexity"], entry["perplexity_overall"]] == pytest.approx(perplexity)


# -- Files -----------------------------------------------------------------------------------------

def test_a_failing_save_leaves_the_old_file_whole_and_nothing_beside_it(tmp_path, monkeypatch):
    path = tmp_path / "model.pt"
    checkpoints.save_atomically({"step": 1}, path)

    def fail(value, name, *args, **kwargs):
        Path(name).write_bytes(b"half a fi")
        raise OSError("disk full")
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", fail)
        with pytest.raises(OSError, match="disk full"):
            checkpoints.save_atomically({"step": 2}, path)
    assert checkpoints.load_checkpoint(path) == {"step": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["model.pt"]


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_whatever_is_no_checkpoint_is_refused_and_code_in_it_never_runs(tmp_path):
    victim, path = tmp_path / "ran", tmp_path / "model.pt"
    torch.save({"model": torch.zeros(1000)}, path)
    whole = path.read_bytes()
    torch.save({"model": Hostile(victim)}, path)
    zipped = path.read_bytes()
    torch.save([1, 2], path)
    contents = [b"", zipped, b"hello", whole[:len(whole) // 2], path.read_bytes(),
                pickle.dumps(Hostile(victim)), "text é".encode()]
    for content in contents:
        path.write_bytes(content)
        with pytest.raises(BadInput) as error:
            checkpoints.load_checkpoint(path)
        assert "\n" not in str(error.value) and "model.pt" in str(error.value)
    assert not victim.exists(), "loading ran code from the file"
    with pytest.raises(BadInput, match="no such"):
        checkpoints.load_checkpoint(tmp_path / "missing.pt")
    with pytest.raises(BadInput):
        checkpoints.load_checkpoint(tmp_path)


def test_checkpoints_hold_tensors_and_plain_values_only(tiny):
    for name in ("tokenizer.pt", "transformer.pt"):
        state = torch.load(tiny.folder / name, weights_only=True)
        assert state["step"] == 24 and state["settings"]["seed"] == 0


def test_loading_workers_can_be_started_where_processes_are_not_forked(tmp_path, monkeypatch):
    """macOS and Windows, and Linux from Python 3.14 on, send workers what they need as pickles."""
    from data import folder
    for i in range(3):
        Image.new("RGB", (20, 20), (i, 9, 9)).save(tmp_path / f"{i}.png")
    images, sent = folder.load("train", data_dir=tmp_path, size=16)[0], []

    def loader(dataset, **options):
        sent.append((dataset, options["collate_fn"]))
        return []
    monkeypatch.setattr(batches, "DataLoader", loader)
    list(batches.picture_batches(images, [[(0, 1), (1, 1)]], 2))
    dataset, collate = pickle.loads(pickle.dumps(sent[0]))
    assert collate([dataset[0, 1], dataset[1, 1]]).shape == (2, 16, 16, 3)


def test_a_refused_command_leaves_no_trace(refused, cli, tiny, tmp_path):
    """What was refused must not be taken for the run's settings by the next command."""
    shutil.copytree(tiny.folder, tmp_path / "run")
    before = (tmp_path / "run" / "settings.json").read_text()
    options = [*tiny.options, "--out", tmp_path / "run"]
    refused("05_train.py", *options, "--tokenizer-lr", 0.5)
    refused("05_train.py", *options, "--precision", "bfloat16")
    assert (tmp_path / "run" / "settings.json").read_text() == before
    assert cli("05_train.py", *options, "--precision", "auto").status == 0


def test_starting_over_forgets_the_transformer_of_other_tokens(cli, tiny, tmp_path):
    shutil.copytree(tiny.folder, tmp_path / "run")
    options = [*tiny.options, "--seed", 1, "--out", tmp_path / "run"]
    assert cli("05_train.py", *options, "--fresh", "--stage", "tokenizer").status == 0
    assert cli("05_train.py", *options).status == 0        # was: refused because of the old one


def test_a_checkpoint_of_another_kind_is_refused_in_a_short_line(refused, tiny, tmp_path):
    shutil.copytree(tiny.folder, tmp_path / "run")
    shutil.copy(tmp_path / "run" / "transformer.pt", tmp_path / "run" / "tokenizer.pt")
    assert len(refused("05_train.py", *tiny.options, "--out", tmp_path / "run")) < 200


def test_held_out_loss_is_not_that_of_the_first_classes_alone(tiny):
    """Folders list their pictures class by class, so the first rows are of a few classes."""
    rows = batches.rows_of(5000, 2000)
    assert len(set(rows)) == 2000 and 2300 < rows.mean() < 2700 and rows.max() > 4900
