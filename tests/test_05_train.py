"""Chapter 5: both stages, what they train on, and how a run is resumed."""
import json
import os
import re
import shutil
import signal
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import same, stage_of
from torch.utils._python_dispatch import TorchDispatchMode

from data import batches, shapes
from data.registry import load_data
from engine import BadInput, checkpoints
from report import health

m1, m2 = import_module("01_vq"), import_module("02_multiscale_vqvae")
m4, m5 = import_module("04_var_transformer"), import_module("05_train")
SCRIPT = "05_train.py"


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def var_model():
    torch.manual_seed(0)
    return m4.VAR(m4.VARConfig(num_classes=3, scales=(1, 2, 4), vocab_size=16, latent_dim=4,
                               depth=2, width=16, heads=2))


# -- A whole run -----------------------------------------------------------------------------------


def test_the_same_command_trains_both_stages_and_makes_pictures(tiny):
    files = {path.name for path in tiny.folder.iterdir()}
    assert {"tokenizer.pt", "transformer.pt", "log.jsonl", "tokens_train.npy", "samples.png",
            "reconstructions.png"} <= files
    assert not any(name.endswith(".tmp") for name in files) and tiny.stderr == ""
    entries = log_of(tiny.folder)
    steps = [e for e in entries if e["stage"] == "transformer" and "loss" in e]
    assert [e["step"] for e in steps] == list(range(1, 25))
    assert len(steps[0]["per_scale"]) == 3 and abs(steps[0]["loss"] - np.log(16)) < 0.1
    assert np.dot(steps[0]["per_scale"], [1, 4, 16]) / 21 == pytest.approx(steps[0]["loss"], 1e-4)
    for key, better in (("psnr", 1), ("loss", -1)):        # both stages learn
        values = [e["held_out"][key] for e in entries if key in e.get("held_out", {})]
        assert len(values) >= 2 and better * (values[-1] - values[0]) > 0


def test_the_checkpoint_holds_the_transformer_alone_and_plain_values(tiny):
    state = torch.load(tiny.folder / "transformer.pt", weights_only=True)
    assert state["config"]["num_classes"] == 3 and state["class_names"] == ["ant", "bee", "cat"]
    assert len(state["model"]["class_embed.weight"]) == 4, "and a row for no class"
    assert set(state["model"]) == set(var_model().state_dict())
    words = ("encoder", "decoder", "quant", "phi", "codebook", "tokenizer")
    assert not [name for name in state["model"] if any(word in name for word in words)]
    count = sum(len(g["params"]) for o in state["optimizers"] for g in o["param_groups"])
    assert count == len(list(var_model().parameters())) and state["step"] == 24


def test_stage_2_is_shown_shuffled_classes_and_leaves_the_tokenizer_as_it_is(
        cli, tiny, tmp_path, monkeypatch):
    """What reaches the model, not what batch_indices says: class folders are sorted by class, and
    a model that sees one class after the other learns nothing. The tokenizer gets no gradients, not
    a bit of its file changes, and once the cache is built nobody calls its encoder."""
    shutil.copytree(tiny.folder, tmp_path / "run")
    before, seen = (tmp_path / "run" / "tokenizer.pt").read_bytes(), []
    forward, teacher_inputs = m4.VAR.forward, m2.MultiScaleVQVAE.teacher_inputs

    def encode(self, image):
        raise AssertionError("stage 2 called the encoder")

    def spy(self, labels, inputs):
        if self.training:
            seen.append(labels.tolist())
        return forward(self, labels, inputs)

    def spy_on_inputs(self, tokens):
        assert not self.training and not any(p.requires_grad for p in self.parameters())
        return teacher_inputs(self, tokens)
    monkeypatch.setattr(m2.MultiScaleVQVAE, "encode", encode)
    monkeypatch.setattr(m2.MultiScaleVQVAE, "teacher_inputs", spy_on_inputs)
    monkeypatch.setattr(m4.VAR, "forward", spy)
    result = cli(SCRIPT, *tiny.options, "--stage", "transformer", "--fresh", "--out",
                 tmp_path / "run")
    assert result.status == 0 and "resuming" not in result.out, result.err
    assert len(seen) == 24 and sum(len(set(labels)) > 1 for labels in seen) > 18
    assert len({tuple(labels) for labels in seen}) > 12
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


@pytest.mark.parametrize("options, flat", [
    ("--quantizer lfq --optimizer adamw --flip --precision bfloat16 --accumulate 2", True),
    ("--set learn=gradient residual=false scales=4 picture_loss=l1", False)])
def test_other_variants_train_and_a_flat_folder_makes_an_unconditional_model(cli, tiny, tmp_path,
                                                                             options, flat):
    folder = tiny.pictures
    if flat:
        folder = tmp_path / "flat"
        folder.mkdir()
        for i, path in enumerate(sorted(tiny.pictures.glob("*/*.png"))):
            shutil.copy(path, folder / f"{i}.png")
    result = cli(SCRIPT, *tiny.options, "--dataset", folder, "--tokenizer-steps", 2, "--steps", 2,
                 *options.split(), "--out", tmp_path / "run")
    assert result.status == 0, result.err
    losses = [e["loss"] for e in log_of(tmp_path / "run") if "loss" in e]
    assert len(losses) == 4 and np.isfinite(losses).all()
    state = checkpoints.load_checkpoint(tmp_path / "run" / "transformer.pt")
    assert state["class_names"] == (["flat"] if flat else ["ant", "bee", "cat"])
    assert state["config"]["num_classes"] == len(state["class_names"])


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


def test_stage_2_alone_takes_the_picture_size_from_the_tokenizer(cli, tiny, tmp_path):
    """--stage transformer without repeating the tokenizer's sizes works, or says what to repeat."""
    (tmp_path / "run").mkdir()
    shutil.copy(tiny.folder / "tokenizer.pt", tmp_path / "run")
    result = cli(SCRIPT, "--dataset", tiny.pictures, "--stage", "transformer", "--steps", 1,
                 *"--depth 2 --set width=16 heads=2 --batch-size 4 --views 1 --workers 0".split(),
                 "--device", "cpu", "--precision", "float32", "--out", tmp_path / "run")
    assert result.status == 0, result.err


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


def test_the_loss_of_a_token_is_minus_the_log_of_its_softmax():
    """Each token has its own, in nats, against a slow loop in float64."""
    stage = stage_of("transformer")
    model = stage.model.eval()
    for p in model.parameters():                           # unlike tokens must be unlike likely
        p.data.add_(0.3 * torch.randn_like(p))
    tokens, labels = torch.randint(16, (3, 21)), torch.tensor([0, 2, 3])
    loss, right = stage.per_token(model, tokens, labels)
    logits = model(labels, stage.tokenizer.teacher_inputs(list(tokens.split([1, 4, 16], 1))))
    logits = logits.detach().double().numpy()
    for b, t in np.ndindex(3, 21):
        row, code = logits[b, t], int(tokens[b, t])
        assert float(loss[b, t]) == pytest.approx(np.log(np.exp(row).sum()) - row[code], rel=1e-4)
        assert bool(right[b, t]) == (code == row.argmax())
    assert loss.shape == (3, 21) and loss.std() > 0.1
    text, numbers = stage.describe(loss.mean(0), 0.5)
    slow = [float(loss[:, a:b].mean()) for a, b in ((0, 1), (1, 5), (5, 21))]
    assert numbers["per_scale"] == pytest.approx(slow, rel=1e-4)
    assert text.startswith("per-scale " + " ".join(f"{x:.2f}" for x in slow))


@pytest.mark.parametrize("flip, kind", [(False, "l2"), (True, "l1")])
def test_the_loss_of_stage_1_and_half_of_its_images_mirrored_if_asked(flip, kind):
    stage, seen = stage_of("tokenizer", flip=flip, picture_loss=kind, vq_weight=0.5), []

    def model(image):
        seen.append(image)
        return 0 * image, [], dict(reconstruction=torch.tensor(2.0), vq=torch.tensor(3.0), extra=5)
    pixels = next(stage.batches(0))[0].repeat(8, 1, 1, 1)
    loss, _ = stage.loss(model, (pixels,), 0)
    picture = 2 if kind == "l2" else float(seen[0].abs().mean())
    assert float(loss) == pytest.approx(picture + 0.5 * (3 + 5), rel=1e-5)
    image = batches.to_float(pixels)
    mirrored, plain = ([torch.equal(a, b) for a, b in zip(seen[0], other)]
                       for other in (image.flip(3), image))
    assert all(a != b for a, b in zip(mirrored, plain))
    assert 0.2 < np.mean(mirrored) < 0.8 if flip else not any(mirrored)


def test_stage_2_is_evaluated_on_held_out_tokens():
    stage = stage_of("transformer")
    stage.data["train"] = None
    tokens, labels = stage.data["test"]
    loss, _ = stage.per_token(stage.model.eval(), torch.from_numpy(tokens[0]).long(),
                              torch.from_numpy(labels))
    assert stage.evaluate()[1]["loss"] == pytest.approx(float(loss.mean()), rel=1e-5)


# -- Stage 2 on a tokenizer from a file ------------------------------------------------------------


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


def test_stage_2_trains_on_the_released_tokenizer(cli, tiny, tmp_path, released_file):
    result = cli(SCRIPT, *tiny.options[:2], *ON_RELEASED, "--tokenizer-file", released_file,
                 "--out", tmp_path / "run")
    assert result.status == 0, result.err
    weights = torch.load(released_file, weights_only=True)
    tokenizer, about = m5.load_tokenizer(tmp_path / "run" / "tokenizer.pt")
    assert torch.equal(tokenizer.quantizer.codebook, weights["quantize.embedding.weight"])
    assert torch.equal(tokenizer.decoder.conv_out.weight, weights["decoder.conv_out.weight"])
    assert tokenizer.config.scales == (1, 2, 3, 4) and about["class_names"] == ["ant", "bee", "cat"]
    images, *_ = load_data(str(tiny.pictures), "test", 64)
    image = batches.to_float(batches.sample_of(images, len(images)))
    cache = np.load(tmp_path / "run" / "tokens_test.npy")[0]
    assert np.array_equal(cache, torch.cat(tokenizer.image_to_tokens(image), 1).numpy())


@pytest.mark.slow
def test_a_run_on_the_released_tokenizer_resumes_and_is_sampled_from_without_its_file(
        cli, refused, tiny, tmp_path, released_file, monkeypatch):
    options = [*tiny.options[:2], *ON_RELEASED]
    file, run = ["--tokenizer-file", released_file], ["--out", tmp_path / "run"]
    assert cli(SCRIPT, *options, *file, "--out", tmp_path / "straight").status == 0
    summary, calls = m5.TransformerStage.summary, []

    def stop(self, metrics):                               # it is called at every step here
        calls.append(len(calls))
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return summary(self, metrics)
    with monkeypatch.context() as patch:
        patch.setattr(m5.TransformerStage, "summary", stop)
        assert cli(SCRIPT, *options, *file, *run).status == 143
    again = cli(SCRIPT, *options, *run)
    assert again.status == 0 and "transformer: resuming at step 3" in again.out, again.err
    assert same(*[checkpoints.load_checkpoint(tmp_path / name / "transformer.pt")
                  for name in ("straight", "run")])
    sampled = cli("06_sample_and_edit.py", "--run", tmp_path / "run", "--task", "sample", "--n", 2,
                  "--classes", "bee", "--device", "cpu", "--out", tmp_path / "made")
    assert sampled.status == 0 and (tmp_path / "made" / "samples.png").exists(), sampled.err

    weights = torch.load(released_file, weights_only=True)
    other = {**weights, "quantize.embedding.weight": 1 + weights["quantize.embedding.weight"]}
    torch.save({"trainer": {"vae_local": other}}, tmp_path / "other.pth")
    file = ["--tokenizer-file", tmp_path / "other.pth"]
    line = refused(SCRIPT, *options, *file, *run)
    assert "another tokenizer" in line and "--fresh" in line
    result = cli(SCRIPT, *options, *file, *run, "--fresh")
    assert result.status == 0, result.err
    tokenizer, _ = m5.load_tokenizer(tmp_path / "run" / "tokenizer.pt")
    assert torch.equal(tokenizer.quantizer.codebook, other["quantize.embedding.weight"])


def test_a_released_file_always_gives_the_same_tokenizer(released_file):
    """Also its buffers that training alone uses: a run knows its tokenizer by all of them."""
    one = m5.open_tokenizer(released_file, (1, 2, 3, 4)).state_dict()
    dirt = [torch.full((64, 8), torch.nan) for _ in range(100)]      # what memory may hold
    del dirt
    assert same(one, m5.open_tokenizer(released_file, (1, 2, 3, 4)).state_dict())
    assert all(value.isfinite().all() for value in one.values())


def test_stage_2_trains_on_the_tokenizer_of_another_run(cli, tiny, tmp_path):
    result = cli(SCRIPT, *tiny.options[:2], *ON_RELEASED, "--tokenizer-file",
                 tiny.folder / "tokenizer.pt", "--steps", 1, "--out", tmp_path / "run")
    assert result.status == 0, result.err
    mine, theirs = (checkpoints.load_checkpoint(folder / "tokenizer.pt")
                    for folder in (tmp_path / "run", tiny.folder))
    assert same(mine["model"], theirs["model"]) and same(mine["config"], theirs["config"])


@pytest.mark.parametrize("options, words", [
    ("--tokenizer-file nowhere.pth", "nowhere.pth"),
    ("--image-size 48", "scale")])
def test_a_tokenizer_file_that_cannot_serve_is_one_line(refused, tiny, tmp_path, released_file,
                                                       options, words):
    line = refused(SCRIPT, *tiny.options[:2], *ON_RELEASED, "--tokenizer-file", released_file,
                   *options.split(), "--out", tmp_path / "run")
    assert words in line and not (tmp_path / "run").exists()


# -- Steps -----------------------------------------------------------------------------------------


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
    ("tokenizer", dict(learn="gradient")), ("transformer", dict(precision="float16"))])
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


def test_ten_steps_in_a_row_that_are_not_finite_stop_the_run_with_one_line(
        refused, tiny, tmp_path, monkeypatch):
    shutil.copytree(tiny.folder, tmp_path / "run")
    seen, loss = [], m5.TransformerStage.loss

    def spoil(self, model, batch, progress):
        seen.append(len(seen))
        value, metrics = loss(self, model, batch, progress)
        return value * (torch.nan if seen[-1] >= 5 else 1), metrics
    monkeypatch.setattr(m5.TransformerStage, "loss", spoil)
    line = refused(SCRIPT, *tiny.options, "--stage", "transformer", "--fresh", "--out",
                   tmp_path / "run")
    assert "finite" in line and "learning rate" in line and len(seen) == 15
    kept = checkpoints.load_checkpoint(tmp_path / "run" / "transformer.pt")["model"]
    assert all(v.isfinite().all() for v in kept.values())


# -- Resumed, refused ------------------------------------------------------------------------------


def test_other_settings_on_resume_are_refused_name_what_changed_and_lose_nothing(
        refused, cli, tiny, tmp_path):
    shutil.copytree(tiny.folder, tmp_path / "run")
    options = [*tiny.options, "--out", tmp_path / "run"]
    for change, name in (("--lr 0.5", "lr"), ("--tokenizer-lr 0.5", "tokenizer_lr"),
                         ("--steps 25", "steps"), ("--precision bfloat16", "precision"),
                         ("--set vq_weight=0.5", "vq_weight")):
        line = refused(SCRIPT, *options, *change.split())
        assert f"{name} " in line and "--fresh" in line
    assert same(checkpoints.load_checkpoint(tmp_path / "run" / "transformer.pt"),
                checkpoints.load_checkpoint(tiny.folder / "transformer.pt"))
    # The precision that was refused must not be taken for the run's by the next command.
    result = cli(SCRIPT, *options, "--precision", "auto", "--accumulate", 2, "--log-every", 7)
    assert result.status == 0 and result.out.count("trained for 24 steps") == 2
    assert log_of(tmp_path / "run") == log_of(tiny.folder)


@pytest.mark.slow
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


def wait_for(process, word):
    """Read lines until one begins with `word`; -> all lines read"""
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith(word):
            return lines
    raise AssertionError("".join(lines) + process.stderr.read())


def test_starting_over_forgets_the_transformer_of_other_tokens(cli, tiny, tmp_path):
    options = [*tiny.options, "--tokenizer-steps", 2, "--steps", 2, "--out", tmp_path / "run"]
    assert cli(SCRIPT, *options).status == 0
    assert cli(SCRIPT, *options, "--seed", 1, "--fresh", "--stage", "tokenizer").status == 0
    assert not (tmp_path / "run" / "transformer.pt").exists()
    assert cli(SCRIPT, *options, "--seed", 1).status == 0


def test_an_empty_folder_and_a_file_are_refused(refused, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "note.txt").write_text("no picture")
    for name in ("empty", "note.txt"):
        refused(SCRIPT, "--dataset", tmp_path / name, "--out", tmp_path / "run", "--device", "cpu")


@pytest.mark.slow
def test_the_real_script_prints_one_line_and_no_traceback(tmp_path, tiny):
    process = tiny.start(SCRIPT, "--dataset", "nosuch", "--device", "cpu", cwd=tmp_path)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 2 and err.count("\n") == 1 and "'nosuch'" in err


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_cuda_without_a_gpu_is_refused(refused, tmp_path):
    assert "cuda" in refused(SCRIPT, "--device", "cuda", "--out", tmp_path / "run")


# -- Two processes ---------------------------------------------------------------------------------


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


@pytest.mark.slow
def test_two_processes_have_one_codebook_and_count_its_usage_together(tiny, tmp_path):
    """Three scales use three of the four phis: one has no gradient, and that is fine."""
    options = [*tiny.options, *"--stage tokenizer --tokenizer-steps 20 --vocab-size 64 "
               "--log-every 5".split()]
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
        expected = health.usage(health.count_codes(scales, 64))
        for key in ("used", "used_overall", "perplexity", "perplexity_overall"):
            assert entry[key] == pytest.approx(expected[key]), key
