"""See it think, pictures and patience, and the command line of chapter 6."""
import math
import shutil
from importlib import import_module
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from engine import BadInput, checkpoints, progress
from report import gallery, plots, studio

m2, m4 = import_module("02_multiscale_vqvae"), import_module("04_var_transformer")
m5, m6 = import_module("05_train"), import_module("06_sample_and_edit")
SCRIPT, NOBODY = "06_sample_and_edit.py", 3                # the row of "no class", after three


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def make_models(scales=(1, 2, 4), V=16, noise=0.3, multipliers=(1, 2), **options):
    """A tokenizer and a transformer with random weights; the gates are open, so that everything
    has an effect."""
    torch.manual_seed(0)
    tokenizer = m2.MultiScaleVQVAE(m2.TokenizerConfig(
        image_size=scales[-1] * 2 ** len(multipliers), scales=scales, vocab_size=V, latent_dim=4,
        channels=8, multipliers=multipliers, unshuffle=2, groups=4))
    var = m4.VAR(m4.VARConfig(num_classes=3, scales=scales, vocab_size=V, latent_dim=4, depth=2,
                              width=16, heads=2, **options))
    with torch.no_grad():
        for p in var.parameters():
            p.add_(noise * torch.randn_like(p))
    return tokenizer.eval().requires_grad_(False), var.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def models():
    return make_models()


def noise_image(side=16, count=2, seed=0):
    return torch.rand(count, 3, side, side, generator=seeded(seed)) * 2 - 1


def random_maps(tokenizer, count, seed=0):
    V = tokenizer.config.vocab_size
    return [torch.randint(V, (count, s * s), generator=seeded(seed + s)) for s in tokenizer.scales]


@torch.no_grad()
def stepwise(tokenizer, var, tokens, labels):
    """The logits of each scale given the coarser tokens, one cached step after the other: K of
    (B, n, V)."""
    conditioning, cache = var.conditioning(labels), var.new_cache()
    f_hat, inputs, logits = 0, None, []
    for k, tokens_k in enumerate(tokens):
        logits.append(var.step(k, inputs, conditioning, cache))
        f_hat, inputs = tokenizer.next_input(k, f_hat, tokens_k)
    return logits


# -- See it think ----------------------------------------------------------------------------------

@pytest.mark.parametrize("qk_norm", [True, False])
@pytest.mark.parametrize("scales", [(1, 2, 3), (2, 4)])
def test_attention_weights_are_those_that_the_model_computes_with(scales, qk_norm):
    """Looked up in a loop over the values, they must give what each attention really put out."""
    tokenizer, var = make_models(scales, qk_norm=qk_norm)
    tokens, labels, real = random_maps(tokenizer, 2), torch.tensor([1, NOBODY]), []
    hooks = [block.attention.register_forward_hook(lambda *args: real.append(args[1:]))
             for block in var.blocks]
    found = gallery.attention_weights(var, labels, tokenizer.teacher_inputs(tokens))
    for hook in hooks:
        hook.remove()
    sides = [s for s in scales for _ in range(s * s)]
    for weights, (inputs, output), block in zip(found, real, var.blocks, strict=True):
        assert weights.shape == (2, 2, var.L, var.L) and weights.min() >= 0
        assert torch.allclose(weights.sum(-1), torch.ones(2, 2, var.L), atol=1e-5)
        for i, j in product(range(var.L), repeat=2):
            assert sides[j] <= sides[i] or float(weights[:, :, i, j].max()) == 0
        ours = block.attention
        v = F.linear(inputs[0], ours.qkv.weight[-16:], ours.v_bias).view(2, var.L, 2, 8)
        looked_up = [sum(weights[:, :, i, j, None] * v[:, j] for j in range(var.L)).flatten(1)
                     for i in range(var.L)]                # heads side by side: (B, D) each
        assert torch.allclose(ours.proj(torch.stack(looked_up, 1)), output, atol=1e-5)


def test_the_attention_of_some_queries_is_that_of_all(models):
    tokenizer, var = models
    labels, shown = torch.tensor([0, 1]), tokenizer.teacher_inputs(random_maps(tokenizer, 2))
    every = gallery.attention_weights(var, labels, shown)
    for part in (slice(0, 1), slice(3, 9), slice(20, 21)):
        some = gallery.attention_weights(var, labels, shown, part)
        for a, b in zip(every, some, strict=True):
            assert torch.allclose(a[:, :, part], b, atol=1e-6)


def test_listening_leaves_nothing_behind_even_when_the_model_fails(models):
    tokenizer, var = models
    shown = tokenizer.teacher_inputs(random_maps(tokenizer, 1))
    gallery.attention_weights(var, torch.tensor([0]), shown)
    with pytest.raises(RuntimeError):
        gallery.attention_weights(var, torch.tensor([0]), shown[:, :, 1:])
    assert not any(block.attention._forward_pre_hooks for block in var.blocks)


@pytest.fixture
def watched(models, monkeypatch):
    """A studio just large enough for the figures of a model's thoughts; .maps: what was given to
    the heat maps as (matrix, low, high), .sheets: what was saved."""
    stage = SimpleNamespace(tokenizer=models[0], var=models[1], side=16, maps=[], sheets={},
                            names=["ant", "bee", "cat"])
    heat_map = plots.heat_map

    def spy(matrix, low, high):
        stage.maps.append((np.array(matrix), low, high))
        return heat_map(matrix, low, high)
    monkeypatch.setattr(gallery.plots, "heat_map", spy)
    stage.save = lambda name, images, columns, **labels: stage.sheets.update(
        {name: SimpleNamespace(images=images, columns=columns, **labels)})
    return stage


def test_the_entropy_shown_is_that_of_the_slow_sum(watched, models):
    tokens, labels = random_maps(models[0], 2), torch.tensor([0, 2])
    gallery.entropy(watched, noise_image(), tokens, labels)
    sheet = watched.sheets["entropy"]
    assert len(sheet.images) == 2 * 4 and sheet.columns == 2
    assert sheet.column_labels == ["ant", "cat"]
    found = zip(stepwise(*models, tokens, labels), watched.maps, sheet.row_labels[1:], strict=True)
    for logits, (shown, low, high), text in found:
        assert (low, high) == (0, 4), "from sure to all 16 codes alike"
        for b, n in np.ndindex(shown.shape):
            p = [math.exp(x) for x in logits[b, n].tolist()]
            bits = -sum(x / sum(p) * math.log2(x / sum(p)) for x in p)
            assert abs(bits - shown[b, n]) < 1e-4
        assert f": {shown.mean():.1f} bits" in text


def test_the_attention_shown_is_that_of_the_cell_in_the_middle(watched, models):
    tokenizer, var = models
    tokens, labels = random_maps(tokenizer, 1), torch.tensor([1])
    gallery.attention(watched, noise_image(count=1), tokens, labels)
    found = gallery.attention_weights(var, labels, tokenizer.teacher_inputs(tokens))
    query = [w[0, :, 1 + 4 + 4 * 2 + 2].mean(0) for w in found]          # row 2, column 2 of 4x4
    parts = [part for w in query for part in w.split([1, 4, 16])]
    for part, (shown, _, _) in zip(parts, watched.maps, strict=True):
        assert np.allclose(2 ** shown.flatten(), part.numpy() * 21, rtol=1e-3)
    shares = [sum(float(p.sum()) for p in parts[k::3]) / 2 for k in range(3)]
    assert watched.sheets["attention"].column_labels == ["query"] + [
        f"{s}x{s}: {share:.0%}" for s, share in zip((1, 2, 4), shares)]


# -- Pictures and patience -------------------------------------------------------------------------

def noise_photo(width, height, channels=3, seed=0):
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)
    return noise[..., 0] if channels == 1 else noise


@given(width=st.integers(1, 30), height=st.integers(1, 30), channels=st.sampled_from([1, 3]))
def test_square_cuts_the_middle_without_touching_its_pixels(width, height, channels):
    short, photo = min(width, height), noise_photo(width, height, channels)
    wanted = np.empty((short, short, *photo.shape[2:]), np.uint8)
    for y, x in np.ndindex(short, short):                  # an odd row too many stays below
        wanted[y, x] = photo[y + (height - short) // 2, x + (width - short) // 2]
    cut = plots.square(Image.fromarray(photo), short)
    assert cut.dtype == np.uint8 and np.array_equal(cut, wanted)


@pytest.mark.parametrize("width, height, side", [(21, 33, 7), (33, 20, 8), (9, 15, 27)])
def test_square_resizes_as_cutting_first_would_but_for_the_rim(width, height, side):
    """The filter of a pixel at the rim may look a little over the cut."""
    photo = Image.fromarray(noise_photo(width, height))
    cut = plots.square(photo, min(width, height))
    wanted = np.array(Image.fromarray(cut).resize((side, side), Image.LANCZOS)).astype(int)
    ours, rim = plots.square(photo, side), -(-3 * side // min(width, height, side))
    assert ours.shape == (side, side, 3)
    assert (abs(ours - wanted)[rim:-rim, rim:-rim] <= 1).all()


@given(height=st.integers(1, 9), width=st.integers(1, 9), side=st.integers(1, 20))
def test_enlarge_shows_at_every_place_the_pixel_it_lies_in(height, width, side):
    images = torch.rand(2, 3, height, width, generator=seeded(side))
    wanted = torch.empty(2, 3, side, side)
    for y, x in product(range(side), repeat=2):
        wanted[:, :, y, x] = images[:, :, math.floor(y * height / side),
                                    math.floor(x * width / side)]
    assert torch.equal(plots.enlarge(images, side), wanted)


def test_read_gives_an_upright_rgb_picture_on_white(tmp_path):
    colour, grey = noise_photo(7, 5), noise_photo(7, 5, 1)
    clear = noise_photo(7, 5, 4)
    share = clear[..., 3:] / 255
    on_white = clear[..., :3] * share + 255 * (1 - share)
    for pixels, wanted in ((colour, colour), (grey, np.stack([grey] * 3, 2)), (clear, on_white)):
        Image.fromarray(pixels).save(tmp_path / "photo.png")
        found = plots.read(tmp_path / "photo.png")
        assert found.mode == "RGB" and abs(np.array(found) - wanted.astype(float)).max() <= 1
    turned = Image.Exif()
    turned[0x0112] = 6                                     # "the camera was held upright"
    Image.fromarray(colour).save(tmp_path / "photo.png", exif=turned)
    assert np.array_equal(np.array(plots.read(tmp_path / "photo.png")), np.rot90(colour, 3))


@pytest.mark.parametrize("content", [b"", b"no picture", b"\x89PNG\r\n\x1a\n" + b"0" * 40,
                                     b"P6\n3 x\n255\n"])     # here Pillow raises a ValueError
def test_what_is_no_picture_is_refused_in_one_line(tmp_path, content):
    (tmp_path / "photo.png").write_bytes(content)
    for path in (tmp_path / "photo.png", tmp_path / "none.png", tmp_path):
        with pytest.raises(BadInput, match="not a readable picture") as error:
            plots.read(path)
        assert str(path) in str(error.value) and "\n" not in str(error.value)


def hand_on(monkeypatch, parts, seconds, total, **how):
    """progress() over parts that take `seconds` each, on a clock of our own. -> what came out"""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])

    def slow():
        for part, takes in zip(parts, seconds, strict=True):
            now[0] += takes
            yield part
    return list(progress.progress(slow(), total, **how))


def test_progress_speaks_after_three_seconds_and_again_after_three_more(monkeypatch, capsys):
    parts = ["ab", "c", "def", "g", "hi", "j"]
    assert hand_on(monkeypatch, parts, [1, 1.5, 1, 2, 1.5, 50], 10, what="letters") == parts
    # 3.5 s for 6 letters, 4 to come; silent at 5.5 s (2 s later); 7 s for 9; never at the end.
    assert capsys.readouterr().out == ("  6 of 10 letters | eta 2 s\n"
                                       "  9 of 10 letters | eta 1 s\n")


def test_progress_is_silent_when_it_is_quick_and_counts_by_size(monkeypatch, capsys):
    assert hand_on(monkeypatch, [[1], [2]], [1.5, 1.5], 9) == [[1], [2]]
    assert capsys.readouterr().out == "", "three seconds are not more than three"
    pairs = [("x", [1] * 500), ("y", [1] * 700), ("z", [1] * 800)]
    assert hand_on(monkeypatch, pairs, [100, 500, 1], 2_000, size=lambda p: len(p[1])) == pairs
    assert capsys.readouterr().out == ("  500 of 2,000 pictures | eta 5 m\n"
                                       "  1,200 of 2,000 pictures | eta 7 m\n")


def test_progress_takes_no_more_than_it_is_asked_for():
    taken = []
    slowly = progress.progress((taken.append(i) or [i] for i in range(5)), 5)
    assert next(slowly) == [0] and taken == [0]


# -- The command line ------------------------------------------------------------------------------

@pytest.fixture
def sheets(monkeypatch):
    """name -> what was last saved under it: .images (N, 3, H, W), .columns, .row_labels, ..."""
    found, save = {}, plots.save_grid

    def spy(path, images, columns, **labels):
        save(path, images, columns, **labels)
        if not torch.is_tensor(images):                    # uint8 (N, H, W, 3)
            images = torch.from_numpy(images).permute(0, 3, 1, 2) / 255
        found[path.stem] = SimpleNamespace(images=images, columns=columns, **labels)
    monkeypatch.setattr(plots, "save_grid", spy)
    return found


@pytest.fixture
def drawn(cli, tiny, sheets, tmp_path):
    """drawn(*options) runs chapter 6 on the tiny run (classes ant, bee, cat), which must work.
    -> name of each picture file -> its sheet"""
    def call(*options, run=tiny.folder):
        sheets.clear()
        result = cli(SCRIPT, "--run", run, "--device", "cpu", "--out", tmp_path / "out", *options)
        assert result.status == 0, result.err
        assert all((tmp_path / "out" / f"{name}.png").exists() for name in sheets)
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


def test_guidance_shows_one_class_in_the_same_random_numbers(drawn, painter):
    sheet = drawn("--task", "guidance", "--classes", "cat", "--seed", 3)["guidance"]
    assert sheet.row_labels == [f"cfg {s}" for s in range(6)] and sheet.columns == 8
    for cfg, row in zip(range(6), sheet.images.split(8), strict=True):
        assert torch.allclose(row, painter([2] * 8, seeded(3), cfg=float(cfg)), atol=1e-5)


def test_many_pictures_per_class_make_a_sheet_per_class(drawn):
    few_, many = (drawn("--task", "sample", "--classes", "bee", "ant", "--n", n) for n in (16, 17))
    assert few_.keys() == {"samples", "coarse_to_fine"} and few_["samples"].columns == 16
    bees, ants = many["samples_1_bee"], many["samples_0_ant"]
    assert many.keys() == {"samples_1_bee", "samples_0_ant", "coarse_to_fine"}
    assert all(len(sheet.images) == 17 and sheet.columns == 5 for sheet in (bees, ants))
    assert not torch.equal(bees.images, ants.images)


def test_sheets_are_cut_from_batches_of_any_size(drawn, painter, monkeypatch):
    monkeypatch.setattr(studio.Studio, "at_once", lambda self: 5)
    found, generator = drawn("--task", "sample", "--classes", "bee", "ant", "--n", 18), seeded()
    wanted = torch.cat([painter(part, generator)
                        for part in torch.tensor([1] * 18 + [0] * 18).split(5)])
    sheets_ = torch.cat([found["samples_1_bee"].images, found["samples_0_ant"].images])
    assert torch.allclose(sheets_, wanted, atol=0.51 / 255)            # rounded to bytes


def test_temperature_from_the_command_line(drawn, refused, tiny):
    plain, one, cold = (drawn("--task", "sample", "--n", 2, *options)["samples"].images for options
                        in ((), ("--temperature", 1), ("--temperature", 0.1)))
    assert torch.equal(plain, one) and not torch.equal(plain, cold)
    for wrong in ("0", "0.0", "-1", "nan", "inf"):
        line = refused(SCRIPT, "--run", tiny.folder, f"--temperature={wrong}")
        assert "temperature" in line


@pytest.mark.parametrize("precision", ["auto", "bfloat16"])
def test_think_draws_both_figures(drawn, precision):
    found = drawn("--task", "think", "--precision", precision)
    assert found.keys() == {"entropy", "attention"}
    assert found["entropy"].column_labels == ["ant", "bee", "cat"]
    assert len(found["attention"].images) == 2 * 4, "two blocks, the query and three scales"


def test_bfloat16_samples_and_edits_from_the_command_line(drawn, monkeypatch):
    dtypes, step = set(), m4.VAR.step
    monkeypatch.setattr(m4.VAR, "step", lambda self, *args: dtypes.add(
        self.head.weight.dtype) or step(self, *args))
    for task in ("sample", "inpaint"):
        found = drawn("--task", task, "--n", 1, "--classes", "bee", "--precision", "bfloat16")
        assert all(sheet.images.isfinite().all() for sheet in found.values()) and found
    assert dtypes == {torch.bfloat16}


def test_a_tokenizer_alone_reconstructs_and_does_nothing_else(drawn, refused, tiny, tmp_path):
    half = tmp_path / "half"
    half.mkdir()
    shutil.copy(tiny.folder / "tokenizer.pt", half)
    alone, both = (drawn("--task", "reconstruct", run=run)["reconstruct"].images
                   for run in (half, tiny.folder))
    assert torch.equal(alone, both) and len(alone) == 3 * 4
    for task in ("sample", "inpaint", "all"):
        line = refused(SCRIPT, "--run", half, "--device", "cpu", "--task", task)
        assert "transformer.pt" in line and "use --task reconstruct" in line
    state = torch.load(half / "tokenizer.pt", weights_only=True)
    torch.save({**state, "dataset": str(tmp_path / "gone")}, half / "tokenizer.pt")
    assert "gone" in refused(SCRIPT, "--run", half, "--device", "cpu", "--task", "reconstruct")


def test_the_kept_part_may_be_faded_in(drawn):
    plain, soft, pasted = (
        drawn("--task", "inpaint", "--classes", "bee", *options)["inpaint"].images for options in
        ((), ("--soft", 2), ("--paste",)))
    assert len(plain) == 5                                 # original, kept, three seeds
    original, shown = plain[:2]
    hidden = torch.arange(16) >= 8                         # the right half, unless asked otherwise
    assert (shown[..., hidden] == 0.5).all()
    assert torch.equal(shown[..., ~hidden], original[..., ~hidden])
    for result, deep in ((soft, 6), (pasted, 8)):          # off the edge by 2, or by nothing
        for painted in result[2:]:
            assert torch.allclose(painted[..., :deep], original[..., :deep], atol=1e-6)
        assert torch.equal(result[2:][..., hidden], plain[2:][..., hidden])
    assert not torch.allclose(soft[2:][..., 6:8], pasted[2:][..., 6:8], atol=1e-3)


def test_grow_shapes_the_out_painted_canvas(drawn):
    """16 pixels, times 0.25 and so on; the picture lies where the shown one lies."""
    for soft in (0, 1):
        sheet = drawn("--task", "outpaint", "--grow", 0.25, 0.1, 0, 0.2, "--soft", soft,
                      "--classes", "bee")["outpaint"]
        shown, painted = sheet.images
        assert shown.shape == (3, 2 + 16 + 3, 4 + 16) and sheet.row_labels == ["kept", "seed 0"]
        inside = slice(2 + soft, 18 - soft), slice(4 + soft, 20)         # no edge on the right
        assert torch.equal(painted[(..., *inside)], shown[(..., *inside)])
        assert (shown[..., :4] == 0.5).all() and not (painted[..., :4] == 0.5).all()


@pytest.mark.parametrize("options, word", [
    ("--smooth --task edit", "--smooth"), ("--smooth --task inpaint", "--smooth"),
    ("--smooth --task evaluate", "--smooth"), ("--grow 9 0 0 0", "--grow"),
    ("--grow 0 0 0 8.01", "--grow"), ("--grow -1 0 0 0", "-1"), ("--grow 1 1 1", "--grow"),
    ("--soft -1", "--soft"), ("--soft 1.5", "--soft"),
    ("--precision float8", "--precision")])
def test_options_that_make_no_sense_are_refused_in_one_line(refused, tiny, options, word):
    assert word in refused(SCRIPT, "--run", tiny.folder, "--device", "cpu", *options.split())


def test_a_single_file_with_both_models_is_a_run_too(cli, tiny, sheets, tmp_path):
    checkpoints.export(tiny.folder, tmp_path / "gift.pt")
    result = cli(SCRIPT, "--run", "gift.pt", "--device", "cpu", "--task", "sample", "--n", 1)
    assert result.status == 0 and "gift.pt" in result.out
    made = tmp_path / "out" / "shipped-gift"
    assert {p.name for p in made.iterdir()} == {"samples.png", "coarse_to_fine.png",
                                                "coarse_to_fine.gif"}
    assert sheets["samples"].row_labels == ["ant", "bee", "cat"]


@pytest.mark.parametrize("width, height", [(33, 50), (47, 16)])
def test_a_mask_of_the_pictures_shape_is_cut_as_the_picture_is(drawn, tmp_path, width, height):
    """The mask is its own picture: hidden must be just what comes out bright in it."""
    blocks = np.random.default_rng(1).integers(0, 2, (12, 12), np.uint8) * 255
    Image.fromarray(blocks).resize((width, height)).save(tmp_path / "mask.png")
    sheet = drawn("--task", "inpaint", "--classes", "ant", "--image", tmp_path / "mask.png",
                  "--mask", tmp_path / "mask.png")["inpaint"]
    original, shown = sheet.images[:2]
    hidden = original > 0.5
    assert 20 < hidden[0].sum() < 236 and len(sheet.images) == 5
    assert torch.equal(shown, torch.where(hidden, 0.5, original))
