"""The experiments behind the tables: the right things are compared."""
import re
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, table
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

benchmark, cost = import_module("experiments.benchmark"), import_module("experiments.cost")
masking = import_module("03_block_causal_mask")
cifar, rows = import_module("experiments.cifar10"), import_module("experiments.tokenizer")
judge, trial = import_module("report.judge"), import_module("experiments.trial")
SMALL = ("--dataset shapes --image-size 16 --set scales=1,2,3,4 multipliers=1,2 unshuffle=2 "
         "--vocab-size 16 --set latent_dim=4 channels=8 groups=4 --tokenizer-batch-size 2 "
         "--tokenizer-steps 5 --set held_out=8 --device cpu --precision float32").split()


def judge_without_training(monkeypatch, classes):
    torch.manual_seed(0)
    network = judge.Judge(classes, 16).eval()
    network.body[-2].weight.data.mul_(300)                 # distances with digits before the point
    monkeypatch.setattr(judge, "judge_of", lambda *args, **how: network)


@pytest.mark.slow
def test_every_row_is_a_tokenizer_trained_its_own_way_once(cli, monkeypatch):
    """Rows may have other scales; the judge of reconstructions is an option."""
    judge_without_training(monkeypatch, 10)
    monkeypatch.setattr(import_module("data.shapes"), "DEFAULT_COUNT", {"train": 20, "test": 10})
    monkeypatch.setitem(rows.ROWS, "fewer", (["--set", "scales=1,2,4"], []))
    names = ["gradient", "EMA + revival", "L2-normalised", "LFQ", "independent scales",
             "adversarial", "fewer"]
    first, again = (cli("experiments.tokenizer.py", "--rows", *names, "--judge", 10, *SMALL)
                    for _ in range(2))
    assert first.status == 0, first.err
    head, *found = table(first.out)
    judged = re.findall(r"Frechet distance ([\d.]+), of the originals ([\d.]+)", first.out)
    assert head[2] == "Frechet" and head[-4:] == ["1x1", "2x2", "3x3", "4x4"]
    assert [(row[0], row[2]) for row in found] == [(name, x) for name, (x, _) in zip(names, judged)]
    assert len({tuple(row[1:]) for row in found}) == len(names), "no two rows are alike"
    assert len({floor for _, floor in judged}) == 1
    assert [bool(cell) for cell in found[-1][-4:]] == [True, True, False, True]
    assert first.out.count("tokenizer 5/5 (100%)") == len(names)
    assert "tokenizer 5/5" not in again.out and table(again.out) == table(first.out)


def test_a_kept_result_keeps_its_date(monkeypatch, tmp_path):
    """And a row of which something else is asked is measured anew."""
    def measured(day, *asked):
        monkeypatch.setattr(trial.time, "strftime", lambda *format: day)
        run = object.__new__(trial.Trial)
        run.folder, run.precision, run.dates = tmp_path, "float32", set()
        for n in asked:
            run.args = SimpleNamespace(steps=1, n=n, seeds=1, dataset="shapes")
            assert run.measure(f"row {n}", 0, lambda: dict(day=day))["day"] in run.dates
        return run.headline().split(", ")[-1]
    assert measured("2026-01-01", 4) == "2026-01-01"
    assert measured("2026-02-02", 4) == "2026-01-01", "nothing was measured"
    assert measured("2026-02-02", 4, 5) == "2026-01-01 to 2026-02-02"
    (tmp_path / "row 5").rename(tmp_path / "row 6")
    assert measured("2026-03-03", 6) == "2026-03-03", "kept for another n"


def test_a_seam_by_hand():
    """One row, kept | hidden after the third pixel: the steps are 1 2 [6] 4 1."""
    editing = import_module("experiments.editing")
    image = torch.tensor([0.0, 1, 3, 9, 13, 14]).expand(1, 3, 2, 6).clone()
    keep = (torch.arange(6) < 3).expand(2, 6)
    for picture, mask in ((image, keep), (image.mT, keep.mT), (-image, ~keep)):
        assert editing.seam(picture, mask) == pytest.approx(6 / 3)
    first = torch.arange(6).expand(2, 6) < 1               # steps [1] 2: nothing before the first
    assert editing.seam(image, first) == pytest.approx(1 / 2)
    last = torch.arange(6).expand(2, 6) < 5                # steps 4 [1]: nothing after the last
    assert editing.seam(image, last) == pytest.approx(1 / 4)


def test_l2_normalised_codes_compare_directions_and_stay_on_the_sphere():
    torch.manual_seed(0)
    quantizer, x = rows.DirectionQuantizer(8, 3).train(), torch.randn(200, 3)
    quantizer.start_on_data([x])
    quantizer.observe([x], [quantizer.nearest(x)])
    quantizer.update()
    assert torch.allclose(quantizer.codebook.norm(dim=1), torch.ones(8), atol=1e-5)
    cosine = torch.nn.functional.normalize(x, dim=1) @ quantizer.codebook.t()
    assert torch.equal(quantizer.nearest(x), cosine.argmax(1))
    assert torch.equal(quantizer.nearest(x), quantizer.nearest(7 * x))


@given(n=st.integers(1, 40), blocks=st.lists(st.integers(1, 5), min_size=1, max_size=6))
def test_sides_grow_by_no_more_than_double_and_products_are_those_of_the_mask(n, blocks):
    sides = cost.next_scale(n)
    assert sides[0] == 1 and sides[-1] == n and list(sides) == sorted(set(sides))
    assert all(b <= 2 * a for a, b in zip(sides, sides[1:]))
    assert cost.next_scale(8) == (1, 2, 3, 4, 6, 8), "the layout of the shapes"
    seen = [(masking.scale_of_token(blocks) <= k).sum() for k in range(len(blocks))]
    assert cost.products(blocks, cached=True) == masking.block_causal_mask(blocks).sum()
    assert cost.products(blocks, cached=False) == sum(count ** 2 for count in seen)


def test_the_cost_experiment_finds_exponents_and_draws_its_figure(cli, tmp_path):
    assert cost.exponent([8, 16, 32], [n ** 2.5 for n in (8, 16, 32)]) == pytest.approx(2.5)
    counted = [cost.products((1,) * n * n, cached=False) for n in (8, 16, 32)]
    assert cost.exponent([8, 16, 32], counted) == pytest.approx(6, abs=0.1), "the paper's O(n^6)"
    options = "--sides 2 3 4 --depth 1 --width 64 --out o/c.png".split()
    out = cli("experiments.cost.py", *options).out
    assert "| 4 | 30 and 16 | 4 and 16 |" in out and "seconds grow as n^" in out
    with Image.open(tmp_path / "o" / "c.png") as image:
        assert len(image.getcolors(9999)) > 5


@pytest.mark.slow
def test_the_more_maps_are_real_the_closer_an_image_comes_to_its_reconstruction(cli, tmp_path):
    run = ROOT / "data/pretrained/shapes.pt"
    _, *rows = table(cli("experiments.independence.py", "--n", 12, "--run", run).out)
    assert [row[1] for row in rows] == ["64", "100", "116", "125", "129", "130"]
    db = [float(row[2]) for row in rows]
    assert db == sorted(db, reverse=True) and db[0] > 30
    assert (tmp_path / "out" / "independence.png").exists()


@pytest.mark.slow
def test_the_benchmark_prints_all_its_tables(monkeypatch, capsys):
    """At sizes that take seconds, with what a GPU would be asked too."""
    small = benchmark.vqvae.TokenizerConfig(channels=8, vocab_size=64)
    monkeypatch.setattr(benchmark, "TOKENIZER", small)
    monkeypatch.setattr(benchmark, "var_config", lambda depth: benchmark.transformer.VARConfig(
        num_classes=5, depth=1, width=64, heads=1, vocab_size=64))
    real = masking.block_causal_attention
    benchmark.original_sizes("cpu", 1)
    benchmark.half_precision(20)
    benchmark.steps("cpu", 1, ["shapes"])
    benchmark.kernels("cpu", batch=2, repeats=1)
    out = capsys.readouterr().out
    same, before, after, apart = map(float, re.search(
        r"(\d+\.\d)% of the tokens are the same.* (\d+\.\d+) -> (\d+\.\d+) dB;.* (\d+\.\d) dB",
        out).groups())
    assert 75 < same < 100 and abs(before - after) < 0.3 and before > 30 and 45 < apart < 80
    rows = {row[0]: row[1:] for row in table(out)}
    names = [*benchmark.ORIGINAL, "shapes", "by prefixes", "dense mask"]
    assert all(float(rows[name][-1].rstrip("x")) > 0 for name in names)
    assert masking.block_causal_attention is real, "everything is put back"


@pytest.mark.slow
def test_the_cifar10_experiment_trains_asks_the_judge_and_prints_what_they_said(
        cli, tiny, tmp_path, monkeypatch):
    """With the tiny run in place of CIFAR-10, whose two chapters are really called."""
    real, commands = import_module("data.registry").load_data, []
    judge_without_training(monkeypatch, 3)
    # Three held-out images are too few.
    monkeypatch.setattr(import_module("report.command_line"), "load_data",
                        lambda name, split, *how: real(name, "train", *how))

    def call(script, *options):
        commands.append([script, *map(str, options)])
        if script.startswith("05"):                        # the tiny data set instead
            at = options.index("cifar10")
            options = [*options[:at], tiny.options[1], *options[at + 1:], *tiny.options[2:]]
        result = cli(script, *options)
        assert result.status == 0, result.err
        return result.out, 1.0
    monkeypatch.setattr(cifar, "call", call)
    run = tmp_path / "run"
    result = cli("experiments.cifar10.py", "--n", 12, "--cfg", 0, 2.5, "--device", "cpu", "--out",
                 run, "--export", tmp_path / "both.pt")
    assert result.status == 0, result.err
    assert (tmp_path / "both.pt").exists() and "tokenizer: steps 0 to 24" in result.out
    assert [c[c.index("--cfg") + 1] for c in commands if "--cfg" in c] == ["0.0", "2.5"]
    lines = {name: numbers for name, *numbers in table(result.out)}
    loss, usage = (cifar.held_out(run, stage) for stage in ("transformer", "tokenizer"))
    assert lines["cross-entropy, nats a token (2,000 pictures)"][-1] == f"{loss['loss']:.3f}"
    assert lines["codes used"] == [f"{x:.0%}" for x in [*usage["used"], usage["used_overall"]]]
    kinds = "held-out images (floor)", "reconstructions", "samples, cfg 0", "samples, cfg 2.5"
    assert all(len(lines[name]) == 4 for name in kinds)


def test_a_wrong_option_of_the_cifar10_experiment_is_one_line(refused, monkeypatch):
    monkeypatch.setattr(cifar, "call", lambda *_: ("a plan", 1.0))
    for options in ("--n 3", "--n -5", "--cfg -1", "--cfg nan", "--dry-run"):
        refused("experiments.cifar10.py", *options.split())


@pytest.mark.slow
def test_the_cifar10_experiment_stops_where_a_chapter_does(refused, tmp_path):
    assert "05_train.py ended with exit status 2" in refused(
        "experiments.cifar10.py", "--data-dir", tmp_path, "--device", "cpu", "--out", tmp_path)
