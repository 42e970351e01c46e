"""Pictures that chapter 6 leaves, through its command line: the images are those of its functions,
and the numbers in the labels are those of slow loops."""
import re
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import random_models, seeded, without_images
from PIL import Image

from report import command_line, gallery, plots

m5, m6 = import_module("05_train"), import_module("06_sample_and_edit")
SCRIPT = "06_sample_and_edit.py"


@pytest.fixture
def sheets(monkeypatch):
    """name -> what was last saved under it: .images (N, 3, H, W), .columns, .row_labels, ..."""
    found, save = {}, plots.save_grid

    def spy(path, images, columns, **labels):
        save(path, images, columns, **labels)
        if not torch.is_tensor(images):                    # uint8 (N, H, W, 3)
            images = torch.from_numpy(images).permute(0, 3, 1, 2) / 255
        found[Path(path).stem] = SimpleNamespace(images=images, columns=columns, **labels)
    monkeypatch.setattr(plots, "save_grid", spy)
    return found


@pytest.fixture
def drawn(cli, tiny, sheets, tmp_path):
    """drawn(*options) runs chapter 6 on the tiny run (classes ant, bee, cat), which must work.
    -> name of each picture file -> its sheet; drawn.out: what was printed"""
    def call(*options, run=tiny.folder):
        sheets.clear()
        result = cli(SCRIPT, "--run", run, "--device", "cpu", "--out", tmp_path / "out", *options)
        assert result.status == 0, result.err
        call.out = result.out
        return dict(sheets)
    return call


@pytest.fixture
def painter(tiny):
    """painter(labels, generator, cfg=...) samples from the tiny run as the command line should."""
    tokenizer, _ = m5.load_tokenizer(tiny.folder / "tokenizer.pt")
    var, about = m5.load_transformer(tiny.folder / "transformer.pt")
    return lambda labels, generator, **how: m6.generate(
        tokenizer, var, torch.as_tensor(labels), generator=generator,
        **{**about["sampling"], **how})


# -- Through the command line ----------------------------------------------------------------------

@pytest.mark.slow
def test_all_tasks_write_valid_images_in_half_precision_too(drawn, tmp_path, monkeypatch):
    for sheet in drawn("--task", "think", "--classes", "bee", "--precision", "bfloat16").values():
        assert sheet.images.isfinite().all()
    drawn("--n", 2)
    names = "samples coarse_to_fine guidance entropy attention reconstruct inpaint outpaint edit"
    files = {path.name: path for path in (tmp_path / "out").iterdir()}
    assert files.keys() == {"coarse_to_fine.gif", *(f"{name}.png" for name in names.split())}
    for path in files.values():
        with Image.open(path) as image:
            assert len(set(image.convert("RGB").resize((40, 40)).tobytes())) > 20, "an empty image"
            assert path.suffix == ".png" or image.n_frames >= 3 and image.size == (6 * 96, 96)
    assert drawn.out.count(" dB") == 5 and "nan" not in drawn.out


def test_samples_are_those_of_the_classes_asked_for_in_batches_of_any_size(
        drawn, painter, monkeypatch):
    few = drawn("--task", "sample", "--classes", "bee", "0", "Bee", "--n", 16, "--seed", 3)
    assert few.keys() == {"samples", "coarse_to_fine"} and few["samples"].columns == 16
    assert few["samples"].row_labels == ["bee", "ant"]
    monkeypatch.setattr(command_line.devices, "prepare_to_sample", lambda *_: 5)
    found = drawn(*"--task sample --classes bee ant --n 18 --cfg 0 --top-k 9".split())
    assert found.keys() == {"samples_1_bee", "samples_0_ant", "coarse_to_fine"}
    generator, labels = seeded(), torch.tensor([1] * 18 + [0] * 18)
    wanted = torch.cat([painter(part, generator, cfg=0.0, top_k=9) for part in labels.split(5)])
    shown = torch.cat([found["samples_1_bee"].images, found["samples_0_ant"].images])
    assert torch.allclose(shown, wanted, atol=0.51 / 255)              # rounded to bytes


def test_guidance_shows_one_class_in_the_same_random_numbers_and_marks_the_default(drawn, painter):
    sheet = drawn("--task", "guidance", "--classes", "cat", "--seed", 3)["guidance"]
    strengths = [0.0, 1.0, 1.5, 2.0, 3.0, 5.0]
    assert sheet.row_labels == [f"cfg {s:g}" + " (default)" * (s == 1.5) for s in strengths]
    for cfg, row in zip(strengths, sheet.images.split(sheet.columns), strict=True):
        assert torch.allclose(row, painter([2] * 8, seeded(3), cfg=cfg), atol=1e-5)


def test_in_painting_keeps_what_lies_outside_the_box(drawn):
    options = ("--task", "inpaint", "--classes", "bee")
    plain = drawn(*options)["inpaint"].images
    told, = re.findall(r"images of bee\n.*kept region ([\d.]+) dB", drawn.out)
    pasted = drawn(*options, "--paste")["inpaint"].images
    assert " dB" not in drawn.out, "pixels that were put back say nothing about the model"
    original, shown, *painted = plain
    hidden = torch.arange(16) >= 8                         # the right half, unless asked otherwise
    errors = torch.stack([(x - original)[..., ~hidden].square().mean() for x in painted])
    assert abs(float(-10 * errors.log10().mean()) - float(told)) < 0.06
    assert (shown[..., hidden] == 0.5).all() and len(painted) == 3
    assert torch.equal(shown[..., ~hidden], original[..., ~hidden])
    assert torch.equal(pasted[2:][..., hidden], plain[2:][..., hidden]), "the same seed"
    assert torch.allclose(pasted[2:][..., ~hidden], original[..., ~hidden], atol=1e-6)


def test_a_mask_of_the_images_shape_is_cut_as_the_image_is(drawn, tmp_path):
    """The mask is its own image: hidden must be just what comes out bright in it."""
    blocks = np.random.default_rng(1).integers(0, 2, (12, 12), np.uint8) * 255
    Image.fromarray(blocks).resize((33, 50)).save(tmp_path / "mask.png")
    sheet = drawn("--task", "edit", "--classes", "ant", "cat", "--image", tmp_path / "mask.png",
                  "--mask", tmp_path / "mask.png")["edit"]
    original, shown = sheet.images[:2]
    hidden = original > 0.5
    assert 20 < hidden[0].sum() < 236 and sheet.row_labels[2:] == ["as ant", "as cat"]
    assert torch.equal(shown, torch.where(hidden, 0.5, original))


def test_the_canvas_grows_around_the_original(drawn):
    """16 pixels, times 0.25 and so on; the original lies where it is in the painted picture."""
    sheet = drawn("--task", "outpaint", "--grow", 0.25, 0.1, 0, 0.2, "--classes", "bee")["outpaint"]
    shown, painted = sheet.images
    assert shown.shape == (3, 2 + 16 + 3, 4 + 16)
    inside = slice(2 + 2, 18 - 2), slice(4 + 2, 20)        # blended over 2 pixels; no right edge
    assert torch.allclose(painted[(..., *inside)], shown[(..., *inside)], atol=1e-6)
    assert (shown[..., :4] == 1).all() and not (painted[..., :4] == 1).all()


def test_images_the_model_draws_for_editing_and_the_edits_share_no_random_numbers(
        drawn, tiny, tmp_path):
    """Else it would paint what was hidden as if by magic: seed 0 would draw the same again."""
    found = drawn("--task", "inpaint", "--box", 0, 0, 1, 1,
                  run=without_images(tiny.folder, tmp_path))["inpaint"]
    original, _, *drawings = found.images.split(3)
    assert len({painted.sum().item() for painted in drawings}) == 3 and "nan" not in drawn.out
    assert "drawn by the model itself" in drawn.out
    assert all((original - painted).abs().max() > 0.01 for painted in drawings)


def test_exported_pixels_are_those_of_a_png_and_classes_take_turns(drawn, painter, tmp_path):
    (tmp_path / "a.npz").write_bytes(b"what was there")
    for options, labels in (((), [0, 1, 2] * 5), (("--classes", "cat", "0"), [2, 0] * 5)):
        assert not drawn("--export-npz", "a.npz", "--n", 5, "--seed", 3, *options), "nothing else"
        with np.load(tmp_path / "a.npz", allow_pickle=False) as file:
            assert file.files == ["arr_0"] and file["arr_0"].dtype == np.uint8
            assert (file["arr_0"] == plots.to_uint8(painter(labels, seeded(3)))).all()

    def broken():
        yield torch.rand(1, 3, 4, 4)
        raise KeyboardInterrupt
    before = (tmp_path / "a.npz").read_bytes()
    with pytest.raises(KeyboardInterrupt):
        gallery.export_npz(tmp_path / "a.npz", broken(), 2, 4)
    assert (tmp_path / "a.npz").read_bytes() == before and not list(tmp_path.glob("a.npz?*"))


# -- Where it is unsure, and where it looks --------------------------------------------------------

def models_and_images(scales=(1, 2, 4), **options):
    image = torch.rand(2, 3, 4 * scales[-1], 4 * scales[-1], generator=seeded()) * 2 - 1
    return *random_models(scales, **options), image


@pytest.mark.parametrize("qk_norm", [True, False])
@pytest.mark.parametrize("scales", [(1, 2, 3), (2, 4)])
def test_attention_weights_are_those_that_the_model_computes_with(scales, qk_norm):
    """Values looked up with them must give what each attention really put out."""
    tokenizer, var, image = models_and_images(scales, qk_norm=qk_norm)
    shown, labels = tokenizer.teacher_inputs(tokenizer.image_to_tokens(image)), torch.tensor([1, 3])
    real = []
    hooks = [block.attention.register_forward_hook(lambda *args: real.append(args[1:]))
             for block in var.blocks]
    found = gallery.attention_weights(var, labels, shown)
    [hook.remove() for hook in hooks]
    some = gallery.attention_weights(var, labels, shown, slice(3, 9))
    hidden = torch.tensor([[later > side for later in scales for _ in range(later ** 2)]
                           for side in scales for _ in range(side ** 2)])
    for weights, part, (inputs, output), block in zip(found, some, real, var.blocks, strict=True):
        assert torch.allclose(weights[:, :, 3:9], part, atol=1e-6)
        assert torch.allclose(weights.sum(-1), torch.ones(2, 2, var.L), atol=1e-5)
        assert (weights[:, :, hidden] == 0).all()
        ours = block.attention
        v = F.linear(inputs[0], ours.qkv.weight[-16:], ours.v_bias).view(2, var.L, 2, 8)
        looked_up = torch.einsum("bhij,bjhc->bihc", weights, v).flatten(2)     # (B, L, D)
        assert torch.allclose(ours.proj(looked_up), output, atol=1e-5)
    with pytest.raises(RuntimeError):
        gallery.attention_weights(var, labels, shown[:, :, 1:])
    assert not any(block.attention._forward_pre_hooks for block in var.blocks), "left behind"


def test_entropy_and_attention_shown_are_those_of_slow_sums(sheets, monkeypatch, tmp_path):
    (tokenizer, var, image), maps = models_and_images(), []
    heat_map = plots.heat_map
    monkeypatch.setattr(plots, "legend", lambda text, ticks: maps.append(text) and None)
    monkeypatch.setattr(plots, "heat_map", lambda *args: maps.append(args) or heat_map(*args))
    gallery.think(tmp_path, tokenizer, var, image, [0, 2], ["ant", "cat"])
    tokens, sizes = tokenizer.image_to_tokens(image), [1, 4, 16]
    logits = var(torch.tensor([0, 2]), tokenizer.teacher_inputs(tokens))
    texts = sheets["entropy"].row_labels
    for part, (shown, low, high), text in zip(logits.split(sizes, 1), maps[:3], texts[1:]):
        assert (low, high) == (0, 4), "from certain to all 16 codes alike"
        p = (part.exp() / part.exp().sum(-1, keepdim=True)).double()                 # (B, n, V)
        bits = -sum(p[..., code] * p[..., code].log2() for code in range(16))
        assert torch.allclose(bits, shown.flatten(1).double(), atol=1e-4)
        assert f": {shown.mean():.1f} bits" in text
    found = gallery.attention_weights(var, torch.tensor([0]), tokenizer.teacher_inputs(
        [t[:1] for t in tokens]))
    parts = [part for w in found for part in w[0, :, 1 + 4 + 4 * 2 + 2].mean(0).split(sizes)]
    assert len(maps) == 3 + 1 + 6 + 1, "row 2, column 2 of 4x4 in two blocks; two legends"
    for part, (shown, _, _) in zip(parts, maps[4:10]):
        assert np.allclose(2 ** shown.flatten(), part.numpy() * 21, rtol=1e-3)
    shares = [sum(float(p.sum()) for p in parts[k::3]) / 2 for k in range(3)]
    assert sheets["attention"].column_labels[1:] == [
        f"{s}x{s}\nattention {share:.0%}\ntokens {n / 21:.0%}"
        for s, n, share in zip((1, 2, 4), sizes, shares)]
