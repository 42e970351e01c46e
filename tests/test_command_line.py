"""The command line of chapter 6: options, runs, classes, masks, and images to work on."""
import re
import shutil
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import without_images
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from data import cifar10
from engine import BadInput, checkpoints
from report import command_line

SCRIPT, m6 = "06_sample_and_edit.py", import_module("06_sample_and_edit")


def noise_photo(width, height, channels=3):
    noise = np.random.default_rng(0).integers(0, 256, (height, width, channels), np.uint8)
    return noise[..., 0] if channels == 1 else noise


@pytest.mark.parametrize("options", [
    "--box 0 0 1 2", "--box 0.5 0 0.2 1", "--box 0 0 1", "--box nan 0 1 1", "--top-p 2",
    "--top-k -1", "--cfg -1", "--cfg inf", "--n 0", "--n 4000000000000000000", "--seed x",
    "--seed 36893488147419103232", "--task paint", "--run nowhere", "--run .", "--run text.png",
    "--released d17", "--image .", "--image text.png", "--image cut.png", "--mask missing.png",
    "--mask damaged.png", "--task inpaint --box 0.5 0.5 0.501 0.501", "--smooth",
    "--task evaluate --classes ant", "--grow 9 0 0 0", "--grow 0 0 0 0", "--precision float8",
    "--tokenizer-file a.pth", "--classes dog", "--classes 3", "--classes=-1", "--export-npz .",
    "--export-npz missing/a.npz", "--export-npz text.png/a.npz"])
def test_a_wrong_option_is_one_line_and_status_2(refused, tiny, tmp_path, monkeypatch, options):
    monkeypatch.setattr(m6, "generate", lambda *_, **__: pytest.fail("sampled for nothing"))
    (tmp_path / "text.png").write_text("this is no image")
    Image.fromarray(noise_photo(40, 40)).save(tmp_path / "whole.png")
    whole = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[:len(whole) // 2])
    (tmp_path / "damaged.png").write_bytes(whole[:500] + b"damage" + whole[506:])
    refused(SCRIPT, "--run", tiny.folder, "--device", "cpu", "--task", "inpaint", *options.split())


# -- Runs ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["tokenizer.pt", "transformer.pt"])
@pytest.mark.parametrize("damage", ["truncated", "missing", "swapped"])
def test_damaged_runs_are_refused_and_named(refused, tiny, tmp_path, name, damage):
    other = "tokenizer.pt" if name == "transformer.pt" else "transformer.pt"
    shutil.copy(tiny.folder / other, tmp_path)
    if damage == "truncated":
        (tmp_path / name).write_bytes((tiny.folder / name).read_bytes()[:4000])
    elif damage == "swapped":
        shutil.copy(tiny.folder / other, tmp_path / name)
    assert name in refused(SCRIPT, "--run", tmp_path, "--device", "cpu")


def test_a_transformer_of_another_tokenizers_tokens_is_refused(refused, tiny, tmp_path):
    state = torch.load(tiny.folder / "tokenizer.pt", weights_only=True)
    state["model"]["quantizer.codebook"] += 1              # the tokens mean something else now
    torch.save(state, tmp_path / "tokenizer.pt")
    shutil.copy(tiny.folder / "transformer.pt", tmp_path)
    assert "--stage transformer" in refused(SCRIPT, "--run", tmp_path, "--device", "cpu")


def test_a_tokenizer_alone_reconstructs_and_does_nothing_else(cli, refused, tiny, tmp_path):
    shutil.copy(tiny.folder / "tokenizer.pt", tmp_path)
    options = ("--run", tmp_path, "--device", "cpu", "--out", tmp_path / "made")
    assert cli(SCRIPT, *options, "--task", "reconstruct").status == 0
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["reconstruct.png"]
    for more in (["--task", "inpaint"], ["--task", "reconstruct", "--export-npz", "a.npz"]):
        line = refused(SCRIPT, *options, *more)
        assert "transformer.pt" in line and "use --task reconstruct" in line
    (without_images(tiny.folder, tmp_path) / "transformer.pt").unlink()
    assert "gone" in refused(SCRIPT, *options, "--task", "reconstruct")


def test_the_newest_run_is_the_default_then_what_came_with_the_code(
        cli, refused, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(command_line, "SHIPPED", tmp_path / "shipped")
    options = ("--device", "cpu", "--task", "sample", "--n", 1)
    assert "05_train.py" in refused(SCRIPT, "--device", "cpu")
    (tmp_path / "shipped").mkdir()
    checkpoints.export(tiny.folder, tmp_path / "shipped" / "gift.pt")
    assert "gift.pt" in cli(SCRIPT, *options).out                       # one file, both models
    assert (tmp_path / "out" / "shipped-gift" / "samples.png").exists()
    for name in ("older", "newer"):
        shutil.copytree(tiny.folder, tmp_path / "out" / name)
        (tmp_path / "out" / name / "transformer.pt").touch()
    result = cli(SCRIPT, *options)
    assert result.status == 0 and "out/newer" in result.out


# -- Images ----------------------------------------------------------------------------------------

def make_job(**fields):
    job = object.__new__(command_line.Job)
    job.args = SimpleNamespace(**{**dict(image=None, mask=None, box=None, data_dir=""), **fields})
    job.side, job.device, job.dataset = 8, torch.device("cpu"), "x"
    return job


def test_real_images_of_other_classes_are_matched_by_name_or_refused(monkeypatch):
    """A subset of ImageNet counts its labels 0, 1, 2. Taken for the model's, they would be tench,
    goldfish and shark."""
    job, labels, images = make_job(), np.array([0, 1, 1, 2]), np.zeros((4, 1, 1, 3), np.uint8)
    monkeypatch.setattr(command_line, "load_data", lambda *_: (images, labels, names))
    all_names = ["ant", "crane", "bee", "crane", "cat"]
    for job.names, names, wanted in (
            (all_names, ["ant", "bee", "cat"], [0, 2, 2, 4]), (all_names, all_names, [0, 1, 1, 2]),
            (["cat", "bee"], ["ant", "bee", "cat"], [1, 1, 0]),          # their own order
            (["bee", "cat"], ["ant", "bee", "cat"], [0, 0, 1])):         # trained with --classes
        assert job.real_images("test")[1].tolist() == wanted
    assert job.labels_in(names, [0, 0, 1]).tolist() == [1, 1, 2]
    job.names = all_names
    for names in (["ant", "dog", "cat"], ["ant", "crane", "cat"]):
        with pytest.raises(BadInput, match=names[1]):
            job.real_images("test")
    job.dataset = None
    with pytest.raises(BadInput, match="--data-dir"):
        job.real_images("test")


def test_images_to_edit_come_with_the_code_unless_a_folder_is_named_and_classes_take_turns(
        tmp_path):
    job = make_job()
    job.dataset, job.side, job.var = "cifar10", 32, None
    job.names, job.classes = ["horse", "ship"], [1, 0]
    image, labels = job.images_to_edit(5)
    horses, ships = (cifar10.examples()[0][cifar10.examples()[1] == c] for c in (7, 8))
    assert labels == [1, 0, 1, 0, 1] and image.shape == (5, 3, 32, 32)
    for found, wanted in zip(image, (ships[0], horses[0], ships[1], horses[1], ships[2])):
        assert torch.equal(found, torch.from_numpy(wanted).permute(2, 0, 1).float() / 127.5 - 1)
    assert len(job.images_to_edit(99)[1]) == 8, "all that there are"
    job.args.data_dir = tmp_path
    (tmp_path / "test_batch.bin").write_bytes(b"not the records")
    with pytest.raises(BadInput, match="test_batch.bin"):
        job.images_to_edit(5)


@pytest.mark.slow
def test_the_shipped_model_of_real_images_edits_them_without_a_download(cli, monkeypatch):
    path = command_line.SHIPPED / "cifar10.pt"
    monkeypatch.setattr(cifar10.files, "download", lambda *_: pytest.fail("it was asked for"))
    result = cli("06_sample_and_edit.py", "--run", path, "--task", "inpaint", "--device", "cpu",
                 "--classes", "ship", "--out", "made")
    assert result.status == 0 and path.stat().st_size < 12e6
    assert float(re.search("kept region ([\\d.]+) dB", result.out)[1]) > 25
    assert (Path("made") / "inpaint.png").exists()


def test_a_mask_keeps_what_is_not_white_and_a_box_what_lies_outside(tmp_path):
    white = np.zeros((12, 8), np.uint8)                    # its middle square: rows 2 to 9
    white[4:8, 4:] = 255
    Image.fromarray(white).save(tmp_path / "mask.png")
    wanted = torch.ones(8, 8, dtype=torch.bool)
    wanted[2:6, 4:] = False
    assert torch.equal(make_job(mask=tmp_path / "mask.png").kept_region("edit"), wanted)
    assert torch.equal(make_job(box=(0.5, 0.25, 1, 0.75)).kept_region("edit"), wanted)
    assert torch.equal(make_job().kept_region("inpaint"), (torch.arange(8) < 4).expand(8, 8))


@given(width=st.integers(1, 30), height=st.integers(1, 30), channels=st.sampled_from([1, 3]))
def test_square_cuts_the_middle_without_touching_its_pixels(width, height, channels):
    short, photo = min(width, height), noise_photo(width, height, channels)
    top, left = (height - short) // 2, (width - short) // 2      # an odd row too many stays below
    cut = command_line.square(Image.fromarray(photo), short)
    assert cut.dtype == np.uint8
    assert np.array_equal(cut, photo[top:top + short, left:left + short])
