"""Chapter 5: both stages, what they train on, and how a run is resumed."""
import copy
import json
import os
import shutil
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import log_of, same, stage_of
from torch.utils._python_dispatch import TorchDispatchMode

from data import batches
from data.registry import load_data
from engine import BadInput, checkpoints, devices
from report import health

m1, m2 = import_module("01_vq"), import_module("02_multiscale_vqvae")
m4, m5 = import_module("04_var_transformer"), import_module("05_train")
SCRIPT = "05_train.py"


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
    model = m4.VAR(m4.VARConfig(**state["config"]))
    assert set(state["model"]) == set(model.state_dict()) and state["step"] == 24
    count = sum(len(g["params"]) for o in state["optimizers"] for g in o["param_groups"])
    assert count == len(list(model.parameters()))


def test_stage_2_is_shown_shuffled_classes_and_leaves_the_tokenizer_as_it_is():
    """What reaches the model, not what batch_indices says: class folders are sorted by class, and
    a model that sees one class after the other learns nothing. Each image is seen once an epoch;
    nobody calls the tokenizer's encoder, and not a bit of the tokenizer changes."""
    stage, seen = stage_of("transformer", batch_size=8, steps=8), []
    tokens, _ = stage.data["train"]
    stage.data["train"] = tokens, np.arange(32) // 11
    stage.tokenizer.encode = lambda *_: pytest.fail("encoded again")
    before = copy.deepcopy(stage.tokenizer.state_dict())

    def model(labels, inputs):
        seen.append(labels.tolist())
        return stage.model(labels, inputs)
    for batch in stage.batches(0):
        m5.train_step(stage, model, batch, 0.5)
    assert len(seen) == 8 and all(len(set(labels)) > 1 for labels in seen)
    assert seen[:4] != seen[4:], "another order in every epoch"
    for epoch in (seen[:4], seen[4:]):
        assert sorted(sum(epoch, [])) == stage.data["train"][1].tolist()
    assert same(before, stage.tokenizer.state_dict()) and not stage.tokenizer.training


def test_loaded_models_are_frozen_and_in_eval_mode(tiny):
    for load, name, other in ((m5.load_tokenizer, "tokenizer.pt", "transformer.pt"),
                              (m5.load_transformer, "transformer.pt", "tokenizer.pt")):
        model, about = load(tiny.folder / name)
        assert not any(module.training for module in model.modules())
        assert not any(p.requires_grad for p in model.parameters())
        assert about["class_names"] == ["ant", "bee", "cat"]
        assert not {"model", "config", "optimizers", "loss_scale"} & about.keys()
        with pytest.raises(BadInput, match=name.removesuffix(".pt")):
            load(tiny.folder / other)


@pytest.mark.parametrize("options, flat", [
    ("--quantizer lfq --optimizer adamw --flip --precision bfloat16 --accumulate 2", True),
    ("--set learn=gradient residual=false scales=4 picture_loss=l1", False)])
def test_other_variants_train_and_a_flat_folder_makes_an_unconditional_model(
        cli, tiny, tmp_path, options, flat):
    folder = tiny.pictures
    if flat:
        shutil.copytree(folder / "ant", folder := tmp_path / "flat")
    result = cli(SCRIPT, *tiny.options, "--dataset", folder, "--tokenizer-steps", 2, "--steps", 2,
                 *options.split(), "--out", tmp_path / "run")
    assert result.status == 0, result.err
    losses = [e["loss"] for e in log_of(tmp_path / "run") if "loss" in e]
    assert len(losses) == 4 and np.isfinite(losses).all()
    state = checkpoints.load_checkpoint(tmp_path / "run" / "transformer.pt")
    assert state["class_names"] == (["flat"] if flat else ["ant", "bee", "cat"])
    assert state["config"]["num_classes"] == len(state["class_names"])


def test_stage_2_alone_knows_the_image_size_and_its_steps_from_epochs(cli, tiny, tmp_path):
    """The tokenizer tells the size; 57 images in batches of 4 make two epochs of 28 steps. Only as
    many images give as many steps on resume."""
    (tmp_path / "run").mkdir()
    shutil.copy(tiny.folder / "tokenizer.pt", tmp_path / "run")
    for words in ("2 epochs of 57", "trained for 28 steps"):
        result = cli(SCRIPT, *ON_FILE[:-2], "--dataset", tiny.pictures, "--out", tmp_path / "run",
                     "--set", "epochs=2")
        assert result.status == 0 and words in result.out, result
    state = checkpoints.load_checkpoint(tmp_path / "run" / "transformer.pt")
    assert (state["step"], state["settings"]["steps"]) == (28, 28)


@pytest.mark.parametrize("kind, count", [("tokenizer", 1), ("transformer", 2)])
def test_data_that_lies_on_the_device_makes_the_same_batches(monkeypatch, kind, count):
    """What a GPU does with small data, here with tensors on the CPU; tokens come as uint16."""
    stages, held = [stage_of(kind, steps=9, tokenizer_steps=9)], []

    def pretend(arrays, device):
        arrays = [a.astype(np.uint16) if a.dtype == np.int64 and a.ndim == 3 else a for a in arrays]
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "to", lambda tensor, device: tensor)
            held.extend(devices.move_small_arrays_to_gpu(arrays, torch.device("cuda")))
        return held[-count:]
    monkeypatch.setattr(m5, "move_small_arrays_to_gpu", pretend)
    stages.append(stage_of(kind, steps=9, tokenizer_steps=9))
    assert held and all(torch.is_tensor(x) and x.dtype != torch.uint16 for x in held)
    assert same(*[list(stage.batches(0)) for stage in stages])


def test_the_loss_of_a_token_is_minus_the_log_of_its_softmax():
    """Each token has its own, in nats, against a slow loop in float64; also on held-out tokens."""
    stage = stage_of("transformer")
    model = stage.model.eval()
    for p in model.parameters():                           # unlike tokens must be unlike likely
        p.data.add_(0.3 * torch.randn_like(p))
    tokens, labels = map(torch.from_numpy, stage.data["test"])
    tokens, stage.data["train"] = tokens[0], None
    loss, right = stage.per_token(model, tokens, labels)
    logits = model(labels, stage.tokenizer.teacher_inputs(list(tokens.split([1, 4, 16], 1))))
    logits = logits.detach().double().numpy()
    for b, t in np.ndindex(32, 21):
        row, code = logits[b, t], int(tokens[b, t])
        assert loss[b, t].item() == pytest.approx(np.log(np.exp(row).sum()) - row[code], rel=1e-4)
        assert right[b, t].item() == (code == row.argmax())
    assert loss.shape == (32, 21) and loss.std() > 0.1
    text, numbers = stage.evaluate()
    slow = [loss[:, a:b].mean().item() for a, b in ((0, 1), (1, 5), (5, 21))]
    assert numbers["per_scale"] == pytest.approx(slow, rel=1e-4)
    assert numbers["loss"] == pytest.approx(loss.mean().item(), rel=1e-5)
    assert "per-scale " + " ".join(f"{x:.2f}" for x in slow) in text
    # What is trained on: a map of side s has s^2 tokens of weight 1/s, so shares 1, 2 and 4 of 7.
    objective, (by_token, _) = stage.loss(stage.model, (tokens, labels), 0.5)
    assert objective.item() == pytest.approx(np.dot(slow, [1, 2, 4]) / 7, rel=1e-4)
    assert torch.equal(by_token, loss.mean(0))
    alike = stage_of("transformer", side_power=0.0)
    assert alike.token_weight.tolist() == [1.0] * 21


@pytest.mark.parametrize("flip, kind, progress, heard", [
    (False, "l2", 0.1, 0), (True, "l1", 0.3, 0.5), (False, "l2", 0.9, 1)])
def test_the_loss_of_stage_1_and_half_of_its_images_mirrored_if_asked(flip, kind, progress, heard):
    """Picture, LPIPS and quantization with their weights, and a critic that is heard late."""
    stage, seen = stage_of("tokenizer", flip=flip, picture_loss=kind, vq_weight=0.5, perceptual=3.0,
                           adversarial=0.25), []
    stage.perceptual = lambda rebuilt, image: torch.tensor([6.0, 8.0])
    stage.critic = SimpleNamespace(loss=lambda image, rebuilt, image_loss: 100 * image_loss)

    def model(image):
        seen.append(image)
        return 0 * image, [], dict(reconstruction=torch.tensor(2.0), vq=torch.tensor(3.0), extra=5)
    pixels = next(stage.batches(0))[0].repeat(8, 1, 1, 1)
    loss, _ = stage.loss(model, (pixels,), progress)
    picture = 3 * 7 + (2 if kind == "l2" else seen[0].abs().mean().item())
    wanted = picture + 0.5 * (3 + 5) + 0.25 * heard * 100 * picture
    assert loss.item() == pytest.approx(wanted, rel=1e-5)
    image = batches.to_float(pixels)
    mirrored, plain = ([torch.equal(a, b) for a, b in zip(seen[0], other)]
                       for other in (image.flip(3), image))
    assert all(a != b for a, b in zip(mirrored, plain))
    assert 0.2 < np.mean(mirrored) < 0.8 if flip else not any(mirrored)


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


ON_FILE = ("--stage transformer --depth 1 --set width=16 heads=2 --views 2 --batch-size 4 "
           "--workers 0 --log-every 1 --device cpu --precision float32 --steps 3").split()


def test_stage_2_trains_on_a_tokenizer_from_a_file_and_then_no_longer_needs_it(
        cli, refused, tiny, tmp_path, released_file):
    run = tmp_path / "run"
    options = [*ON_FILE, "--dataset", tiny.pictures, "--image-size", 64, "--out", run]
    file = ["--tokenizer-file", released_file]
    for more, word in ((["--tokenizer-file", "nowhere.pth"], "nowhere.pth"),
                       ([*file, "--image-size", 48], "scale")):
        assert word in refused(SCRIPT, *options, *more) and not run.exists()
    result = cli(SCRIPT, *options, *file)
    assert result.status == 0, result.err
    weights = torch.load(released_file, weights_only=True)
    tokenizer, about = m5.load_tokenizer(run / "tokenizer.pt")
    assert torch.equal(tokenizer.quantizer.codebook, weights["quantize.embedding.weight"])
    assert torch.equal(tokenizer.decoder.conv_out.weight, weights["decoder.conv_out.weight"])
    assert tokenizer.config.scales == (1, 2, 3, 4) and about["class_names"] == ["ant", "bee", "cat"]
    images, *_ = load_data(str(tiny.pictures), "test", 64)
    image = batches.to_float(batches.sample_of(images, len(images)))
    cache = np.load(run / "tokens_test.npy")[0]
    assert np.array_equal(cache, torch.cat(tokenizer.image_to_tokens(image), 1).numpy())

    again = cli(SCRIPT, *options)
    assert again.status == 0 and "trained for 3 steps" in again.out, again.err
    sampled = cli("06_sample_and_edit.py", "--run", run, "--task", "sample", "--n", 2, "--classes",
                  "bee", "--device", "cpu", "--out", tmp_path / "made")
    assert sampled.status == 0 and (tmp_path / "made" / "samples.png").exists(), sampled.err
    another = ["--tokenizer-file", tiny.folder / "tokenizer.pt"]           # that of another run
    assert "another tokenizer" in refused(SCRIPT, *options, *another)
    assert same(tokenizer.state_dict(), m5.load_tokenizer(run / "tokenizer.pt")[0].state_dict())
    assert cli(SCRIPT, *options, *another, "--fresh").status == 0
    assert same(*[checkpoints.load_checkpoint(folder / "tokenizer.pt")["model"]
                  for folder in (run, tiny.folder)])


def test_a_tokenizer_that_was_trained_in_the_folder_stays_when_a_file_holds_the_same(
        cli, tiny, tmp_path):
    shutil.copytree(tiny.folder, tmp_path / "run")
    options = [*tiny.options, "--stage", "transformer", "--steps", 1, "--out", tmp_path / "run"]
    assert cli(SCRIPT, *options, "--fresh", "--tokenizer-file",
               tiny.folder / "tokenizer.pt").status == 0
    assert same(*[checkpoints.load_checkpoint(folder / "tokenizer.pt")
                  for folder in (tmp_path / "run", tiny.folder)])


def test_a_released_file_always_gives_the_same_tokenizer(released_file):
    """Also its buffers that training alone uses: a run knows its tokenizer by all of them."""
    one = m5.open_tokenizer(released_file, (1, 2, 3, 4)).state_dict()
    dirt = [torch.full((64, 8), torch.nan) for _ in range(100)]      # what memory may hold
    del dirt
    assert same(one, m5.open_tokenizer(released_file, (1, 2, 3, 4)).state_dict())
    assert all(value.isfinite().all() for value in one.values())


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


def test_the_gradient_of_the_model_is_clipped_and_the_critics_is_not():
    stage, norms = stage_of("tokenizer", adversarial=1.0, clip=1e-3), []
    for optimizer in stage.optimizers:
        optimizer.step = lambda: None                      # else the gradients were cleared
        optimizer.zero_grad = lambda set_to_none: None
    result = m5.train_step(stage, stage.model, next(stage.batches(0)), 1.0)
    for part in (stage.model, stage.modules["critic"]):
        grads = [p.grad.flatten() for p in part.parameters() if p.grad is not None]
        norms.append(torch.cat(grads).norm().item())
    assert norms[0] == pytest.approx(1e-3, rel=1e-2) and min(norms[1], result.norm) > 2e-3


def test_steps_in_a_row_that_are_not_finite_stop_the_run_with_one_line(refused, tiny, tmp_path,
                                                                       monkeypatch):
    shutil.copytree(tiny.folder, tmp_path / "run")
    seen, loss = [], m5.TransformerStage.loss

    def spoil(self, model, batch, progress):
        seen.append(progress)
        value, metrics = loss(self, model, batch, progress)
        return value * (torch.nan if len(seen) > 5 else 1), metrics
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


def test_starting_over_forgets_the_transformer_of_other_tokens(cli, tiny, tmp_path):
    shutil.copytree(tiny.folder, tmp_path / "run")
    options = [*tiny.options, "--tokenizer-steps", 2, "--steps", 2, "--out", tmp_path / "run"]
    assert cli(SCRIPT, *options, "--fresh", "--stage", "tokenizer").status == 0
    assert not (tmp_path / "run" / "transformer.pt").exists()
    assert cli(SCRIPT, *options).status == 0


def test_some_of_the_classes_train_stage_2_on_the_tokenizer_of_all(cli, refused, stage_2,
                                                                   monkeypatch):
    options = [*stage_2.options, "--steps", 2, "--classes"]
    result = cli(SCRIPT, *options, "cat", "bee")
    assert result.status == 0 and "2 classes" in result.out
    state = checkpoints.load_checkpoint(stage_2.folder / "transformer.pt")
    assert state["class_names"] == ["bee", "cat"] and state["config"]["num_classes"] == 2
    tokens = np.load(stage_2.folder / "tokens_train.npy")
    assert 0 < tokens.shape[1] < 57, "the images of ant have no tokens"
    assert "trained for 2 steps" in cli(SCRIPT, *options, "Bee", "2").out
    assert "classes" in refused(SCRIPT, *options, "2")     # the first two: other classes
    assert "'dog'" in refused(SCRIPT, *options, "dog")
    seen = []

    def look(settings, processes, folder, config, *images_and_names):
        seen.append([len(part) for part in images_and_names])
        raise BadInput("seen")
    monkeypatch.setattr(m5, "TokenizerStage", look)
    refused(SCRIPT, *options, "cat", "bee", "--stage", "all")
    assert seen == [[57, 3, 2]], "stage 1 has all images"


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
