"""Released weights and the command line of chapter 6."""
import json
import shutil
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from engine import BadInput
from report import judge, studio

m2, m4 = import_module("02_multiscale_vqvae"), import_module("04_var_transformer")
m5, m6 = import_module("05_train"), import_module("06_sample_and_edit")
SCRIPT = "06_sample_and_edit.py"
SHAPES = json.loads((Path(__file__).parent / "golden" / "tiny_keys.json").read_text())
SCALES = (1, 2, 4)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def make_models(scales=SCALES, **options):
    """A tokenizer and a transformer with random weights; the gates are open, so that everything
    has an effect."""
    torch.manual_seed(0)
    tokenizer = m2.MultiScaleVQVAE(m2.TokenizerConfig(
        image_size=4 * scales[-1], scales=scales, vocab_size=16, latent_dim=4, channels=8,
        multipliers=(1, 2), unshuffle=2, groups=4, **options))
    var = m4.VAR(m4.VARConfig(num_classes=3, scales=scales, vocab_size=16, latent_dim=4, depth=2,
                              width=16, heads=2))
    with torch.no_grad():
        for p in var.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return tokenizer.eval().requires_grad_(False), var.eval().requires_grad_(False)


# -- The released weights --------------------------------------------------------------------------

def released(name="plain"):
    """Random state dicts in the released layout, and the scales they were made for."""
    torch.manual_seed(0)
    states = [{key: 0.1 * torch.randn(shape) for key, shape in SHAPES[name][part].items()}
              for part in ("vae", "var")]
    return (*states, tuple(SHAPES[name]["config"]["patch_nums"]))


@pytest.mark.parametrize("name", sorted(SHAPES))
def test_released_layouts_load_bare_or_nested_ready_to_sample(name):
    vae, var, scales = released(name)
    heads = SHAPES[name]["config"]["heads"]
    bare = m6.load_released(dict(vae), dict(var), scales, heads)
    nested = m6.load_released({"trainer": {"vae_local": dict(vae)}, "epoch": 3},
                              {"trainer": {"var_wo_ddp": dict(var)}}, scales, heads)
    for pair in zip(bare, nested):
        assert all(torch.equal(a, b) for a, b in zip(pair[0].state_dict().values(),
                                                     pair[1].state_dict().values()))
    for model in bare:
        assert not any(m.training for m in model.modules())
        everything = [*model.parameters(), *model.buffers()]
        assert not any(x.is_meta or x.requires_grad for x in everything)
    one = m6.generate(*bare, torch.tensor([0, 1]), cfg=1.0, generator=seeded())
    assert one.isfinite().all()
    assert torch.equal(one, m6.generate(*nested, torch.tensor([0, 1]), cfg=1.0,
                                        generator=seeded()))


def spoil(what):
    vae, var, scales = released()
    if what == "swapped":
        vae, var = var, vae
    elif what == "missing entry":
        del var["blocks.1.attn.proj.weight"]
    elif what == "missing tokenizer entry":
        del vae["decoder.conv_out.bias"]
    elif what == "extra entry":
        var["blocks.0.attn.surprise"] = torch.zeros(3)
    elif what == "wrong shape":
        var["blocks.1.attn.proj.weight"] = torch.zeros(3, 3)
    elif what == "flat class table":
        var["class_emb.weight"] = torch.zeros(7)
    elif what == "flat positions":
        var["pos_1LC"] = torch.zeros(30)
    elif what == "no tensor":
        var["pos_1LC"] = "thirty"
    elif what == "number for a name":
        var[5] = torch.zeros(1)
    elif what == "scales that do not fit":
        scales = (1, 2, 3)
    elif what == "scales unknown":
        scales = None
    elif what == "empty":
        vae, var = {}, {}
    elif what == "nested nonsense":
        vae = {"trainer": 5}
    elif what == "our own checkpoint":
        tokenizer, model = make_models()
        vae, var = tokenizer.state_dict(), model.state_dict()
    return vae, var, scales


@pytest.mark.parametrize("what", [
    "swapped", "missing entry", "missing tokenizer entry", "extra entry", "wrong shape",
    "flat class table", "flat positions", "no tensor", "number for a name", "empty",
    "scales that do not fit", "scales unknown", "nested nonsense", "our own checkpoint"])
def test_other_files_are_refused_in_one_line(what):
    with pytest.raises(BadInput) as error:
        m6.load_released(*spoil(what))
    assert "\n" not in str(error.value)


def test_released_files_load_from_the_command_line(refused, cli, tmp_path):
    vae, var, scales = released()
    for name, state in (("vae.pth", vae), ("var.pth", var)):
        torch.save(state, tmp_path / name)
    line = refused(SCRIPT, "--released", "d16", "--tokenizer-file", tmp_path / "vae.pth",
                   "--var-file", tmp_path / "var.pth", "--device", "cpu")
    assert "30 positions" in line                          # the scales of no published model
    refused(SCRIPT, "--released", "d16", "--tokenizer-file", tmp_path / "none.pth", "--var-file",
            tmp_path / "var.pth", "--device", "cpu")


# -- The command line ------------------------------------------------------------------------------

@pytest.fixture
def sampled(cli, tiny, tmp_path):
    """sampled(*options) runs chapter 6 on the tiny run, which must work. -> result, folder"""
    def call(*options, out="pictures"):
        result = cli(SCRIPT, "--run", tiny.folder, "--device", "cpu", "--out", tmp_path / out,
                     *options)
        assert result.status == 0, result.err
        return result, tmp_path / out
    return call


def test_all_tasks_write_valid_pictures(sampled):
    result, out = sampled("--n", 2)
    cell, sheets = 96, {"samples": (3, 2), "coarse_to_fine": (3, 6), "guidance": (6, 8),
                        "entropy": (4, 3), "attention": (2, 4), "reconstruct": (4, 3),
                        "inpaint": (5, 3), "outpaint": (2, 3), "edit": (5, 3)}
    assert {p.name for p in out.iterdir()} == {f"{n}.png" for n in sheets} | {"coarse_to_fine.gif"}
    for name, (rows, columns) in sheets.items():
        with Image.open(out / f"{name}.png") as image:
            image.load()
            assert image.mode == "RGB" and rows * cell <= image.height < rows * (cell + 8) + 20
            assert columns * cell <= image.width < columns * (cell + 8) + 120
            assert len(set(image.resize((40, 40)).tobytes())) > 20, "an empty picture"
    with Image.open(out / "coarse_to_fine.gif") as gif:
        assert gif.n_frames >= 3 and gif.size == (6 * cell, cell)
    assert result.out.count(" dB") == 5 and "nan" not in result.out


def test_the_seed_decides_the_pictures(sampled):
    options = ("--task", "sample", "--n", 1)
    files = [sampled(*options, "--seed", seed, out=str(i))[1] / "samples.png"
             for i, seed in enumerate((3, 3, 4))]
    one, again, other = (path.read_bytes() for path in files)
    assert one == again and one != other


def test_classes_by_name_and_by_index(sampled, refused, tiny):
    files = [sampled("--task", "sample", "--n", 1, "--classes", *names, out=str(i))[1]
             for i, names in enumerate((("bee", "cat"), ("1", "2"), ("BEE", "2"), ("ant",)))]
    one, two, three, four = ((f / "samples.png").read_bytes() for f in files)
    assert one == two == three != four
    for unknown in ("dog", "3", "-1", "1.5"):
        line = refused(SCRIPT, "--run", tiny.folder, "--device", "cpu", f"--classes={unknown}")
        assert unknown in line and "ant" in line


@pytest.mark.parametrize("options", [
    "--box 0 0 1 2", "--box 0.5 0 0.2 1", "--box 0 0 1", "--box a b c d", "--box nan 0 1 1",
    "--top-p 2", "--top-p nan", "--top-k -1", "--cfg -1", "--cfg inf", "--n 0", "--seed x",
    "--seed 36893488147419103232", "--task paint", "--image missing.png", "--image text.png",
    "--image .", "--image cut.png", "--image damaged.png", "--mask missing.png",
    "--mask text.png", "--mask cut.png", "--mask damaged.png", "--nonsense", "--run nowhere",
    "--run .", "--run text.png", "--released d17"])
def test_a_wrong_option_is_one_line_and_status_2(refused, tiny, tmp_path, options):
    (tmp_path / "text.png").write_text("this is no picture")
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8)).save(
        tmp_path / "whole.png")
    whole = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[:len(whole) // 2])
    (tmp_path / "damaged.png").write_bytes(whole[:500] + b"damage" + whole[506:])
    refused(SCRIPT, "--run", tiny.folder, "--device", "cpu", "--task", "inpaint", *options.split())


@pytest.mark.parametrize("name", ["tokenizer.pt", "transformer.pt"])
@pytest.mark.parametrize("damage", ["truncated", "missing", "swapped"])
def test_damaged_runs_are_refused_and_named(refused, tiny, tmp_path, name, damage):
    shutil.copytree(tiny.folder, tmp_path / "run")
    path = tmp_path / "run" / name
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:4000])
    elif damage == "missing":
        path.unlink()
    else:
        shutil.copy(tiny.folder / ("transformer.pt" if name == "tokenizer.pt" else "tokenizer.pt"),
                    path)
    assert name in refused(SCRIPT, "--run", tmp_path / "run", "--device", "cpu")


def test_a_tokenizer_that_the_transformer_was_not_trained_on_is_refused(
        refused, cli, tiny, tmp_path):
    """Stage 1 trained anew, stage 2 not: the tokens mean something else now."""
    shutil.copytree(tiny.folder, tmp_path / "run")
    assert cli("05_train.py", *tiny.options, "--stage", "tokenizer", "--tokenizer-steps", 1,
               "--vocab-size", 8, "--fresh", "--out", tmp_path / "run").status == 0
    refused(SCRIPT, "--run", tmp_path / "run", "--device", "cpu", "--task", "sample", "--n", 8)


def test_real_pictures_of_other_classes_are_matched_by_name_or_refused(monkeypatch):
    """A subset of ImageNet counts its labels 0, 1, 2: whoever took these for the model's would work
    on tench, goldfish and shark instead."""
    room = object.__new__(studio.Studio)
    room.dataset, room.side, room.names = "x", 8, ["ant", "crane", "bee", "crane", "cat"]
    room.args = SimpleNamespace(data_dir="")
    for names, wanted in ((["ant", "bee", "cat"], [0, 2, 2, 4]), (list(room.names), [0, 1, 1, 2]),
                          (["ant", "dog", "cat"], "'dog'"), (["ant", "crane", "cat"], "crane")):
        found = "pixels", np.array([0, 1, 1, 2]), names
        monkeypatch.setattr(studio, "load_data", lambda *_: found)
        if isinstance(wanted, list):
            assert room.load("test")[1].tolist() == wanted
        else:
            with pytest.raises(BadInput, match=wanted):
                room.load("test")


def test_pictures_the_model_draws_for_editing_share_no_random_numbers_with_the_edits(
        cli, tiny, tmp_path):
    """Else it would paint what was hidden as if by magic: seed 0 would draw the same again."""
    shutil.copytree(tiny.folder, tmp_path / "run")
    state = torch.load(tmp_path / "run" / "transformer.pt", weights_only=True)
    torch.save({**state, "dataset": str(tmp_path / "gone")}, tmp_path / "run" / "transformer.pt")
    kept, save = [], studio.Studio.save
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(studio.Studio, "save",
                      lambda self, name, images, *rest, **more: kept.append(images)
                      or save(self, name, images, *rest, **more))
        result = cli(SCRIPT, "--run", tmp_path / "run", "--device", "cpu", "--task", "inpaint",
                     "--box", 0, 0, 1, 1, "--out", tmp_path / "made")
    assert result.status == 0
    original, _, *seeds = kept[0].split(3)
    assert all((original - painted).abs().max() > 0.01 for painted in seeds)


@pytest.mark.parametrize("options", [
    "--task inpaint --box 0.5 0.5 0.501 0.501", "--task outpaint --grow 0 0 0 0",
    "--task evaluate --classes ant", "--task sample --n 4000000000000000000"])
def test_what_asks_for_nothing_or_for_too_much_is_refused(refused, tiny, options):
    refused(SCRIPT, "--run", tiny.folder, "--device", "cpu", *options.split())


def test_classes_named_twice_count_once(sampled):
    one, two = (sampled("--task", "sample", "--n", 2, "--classes", *names, out=str(i))[1]
                for i, names in enumerate((("bee", "ant"), ("bee", "1", "ant", "Bee"))))
    assert (one / "samples.png").read_bytes() == (two / "samples.png").read_bytes()


def test_nothing_to_sample_from_is_one_line(refused, tmp_path, monkeypatch):
    monkeypatch.setattr(studio, "__file__", str(tmp_path / "studio.py"))   # nothing shipped either
    assert "05_train.py" in refused(SCRIPT, "--device", "cpu")


def test_the_newest_run_is_the_default(cli, tiny, tmp_path):
    for name in ("older", "newer"):
        shutil.copytree(tiny.folder, tmp_path / "out" / name)
        (tmp_path / "out" / name / "transformer.pt").touch()
    result = cli(SCRIPT, "--task", "sample", "--n", 1, "--device", "cpu")
    assert result.status == 0 and str(Path("out/newer")) in result.out


def test_image_box_mask_and_paste(sampled, tmp_path):
    """A mask that is white where the box lies gives the same picture as the box."""
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (33, 50, 3), np.uint8)).save(tmp_path / "photo.png")
    white = np.zeros((16, 16), np.uint8)
    white[4:12, 8:16] = 255
    Image.fromarray(white).save(tmp_path / "mask.png")
    options = ("--task", "inpaint", "--image", tmp_path / "photo.png", "--classes", "bee")
    by_box = sampled(*options, "--box", 0.5, 0.25, 1, 0.75, out="box")[1]
    by_mask = sampled(*options, "--mask", tmp_path / "mask.png", out="mask")[1]
    assert (by_box / "inpaint.png").read_bytes() == (by_mask / "inpaint.png").read_bytes()
    result, pasted = sampled(*options, "--box", 0.5, 0.25, 1, 0.75, "--paste", out="paste")
    assert (pasted / "inpaint.png").read_bytes() != (by_box / "inpaint.png").read_bytes()
    assert " dB" not in result.out, "pixels that were put back say nothing about the model"


def test_repainting_everything_reports_no_nan(sampled):
    result, _ = sampled("--task", "inpaint", "--box", 0, 0, 1, 1)
    assert "nan" not in result.out


def test_a_class_without_held_out_pictures_can_be_worked_on(cli, tiny, tmp_path):
    pictures = tmp_path / "some"
    shutil.copytree(tiny.pictures, pictures)
    for path in sorted((pictures / "bee").iterdir())[1:]:
        path.unlink()                                      # one is left: it is trained on
    assert cli("05_train.py", *tiny.options, "--dataset", pictures, "--steps", 1,
               "--tokenizer-steps", 1, "--out", tmp_path / "run").status == 0
    result = cli(SCRIPT, "--run", tmp_path / "run", "--device", "cpu", "--task", "inpaint",
                 "--classes", "bee", "--out", tmp_path / "made")
    assert result.status == 0 or result.status == 2 and result.err.count("\n") == 1


def test_held_out_pictures_that_are_gone_are_replaced_by_samples(cli, tiny, tmp_path):
    shutil.copytree(tiny.folder, tmp_path / "run")
    state = torch.load(tmp_path / "run" / "transformer.pt", weights_only=True)
    torch.save({**state, "dataset": str(tmp_path / "gone")}, tmp_path / "run" / "transformer.pt")
    result = cli(SCRIPT, "--run", tmp_path / "run", "--device", "cpu", "--task", "reconstruct",
                 "--out", tmp_path / "made")
    assert result.status == 0 and (tmp_path / "made" / "reconstruct.png").exists()


@pytest.mark.parametrize("n", [40, 2])
def test_evaluate_prints_its_table_or_one_line(cli, tiny, tmp_path, monkeypatch, n):
    """An untrained judge will do; with too few pictures there is nothing to compare."""
    torch.manual_seed(0)
    monkeypatch.setattr(judge, "load_or_train",
                        lambda *args, **kwargs: judge.Judge(3, 16).eval())
    result = cli(SCRIPT, "--run", tiny.folder, "--device", "cpu", "--task", "evaluate", "--n", n)
    if result.status == 0:
        for word in ("Frechet", "precision", "held-out pictures", "reconstructions", "samples"):
            assert word in result.out
    else:
        assert result.status == 2 and result.err.count("\n") == 1
