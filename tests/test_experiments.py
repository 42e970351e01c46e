"""The studies and the benchmark behind the README's tables: the right things are compared."""
import re
import sys
from importlib import import_module

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

benchmark, cost = import_module("experiments.benchmark"), import_module("experiments.cost")
cifar = import_module("experiments.cifar10")
SCRIPT = "experiments.tokenizer.py"
ROWS = ["gradient", "EMA + revival", "L2-normalised", "LFQ", "independent scales", "adversarial"]
SMALL = ("--dataset shapes --image-size 16 --set scales=1,2,4 multipliers=1,2 unshuffle=2 "
         "--vocab-size 16 --set latent_dim=4 channels=8 groups=4 --tokenizer-batch-size 2 "
         "--tokenizer-steps 5 --set held_out=8 --device cpu --precision float32").split()


@pytest.fixture
def few_shapes(monkeypatch):
    monkeypatch.setattr(import_module("data.shapes"), "DEFAULT_COUNT", {"train": 20, "test": 10})


def test_every_row_is_trained_its_own_way_and_only_once(cli, few_shapes):
    first = cli(SCRIPT, "--rows", *ROWS, *SMALL)
    assert first.status == 0, first.err
    assert first.out.count("tokenizer 5/5 (100%)") == len(ROWS)
    table = [line for line in first.out.splitlines() if line.startswith("| ")]
    assert [line.split(" | ")[0].strip("| ") for line in table[2:]] == ROWS
    assert len({line.split(" | ", 1)[1] for line in table[2:]}) == len(ROWS), "no two rows alike"
    assert all(re.search(r"\| \d+\.\d\d \| \d+% \| \d+ \|( \d+% / \d+ \|){3}$", line)
               for line in table[2:])
    again = cli(SCRIPT, "--rows", *ROWS, *SMALL)
    assert "tokenizer 5/5" not in again.out and table == [
        line for line in again.out.splitlines() if line.startswith("| ")]


def test_the_judge_of_reconstructions_is_an_option_and_rows_may_have_other_scales(
        cli, few_shapes, monkeypatch):
    judge = import_module("report.judge")
    torch.manual_seed(0)
    network = judge.Judge(10, 16).eval()
    network.body[-2].weight.data.mul_(300)                 # distances with digits before the point
    monkeypatch.setattr(judge, "load_or_train", lambda *args, **how: network)
    small = [x.replace("scales=1,2,4", "scales=1,2,3,4") for x in SMALL]
    monkeypatch.setitem(import_module("experiments.tokenizer").ROWS, "fewer",
                        (["--set", "scales=1,2,4"], []))
    result = cli(SCRIPT, "--rows", "EMA + revival", "fewer", "--judge", 10, *small)
    assert result.status == 0, result.err
    found = re.findall(r"Frechet distance ([\d.]+), of the originals ([\d.]+)", result.out)
    assert len({mine for mine, _ in found}) == 2 and len({floor for _, floor in found}) == 1
    assert all(0 < float(floor) < float(mine) for mine, floor in found)
    head, _, one, two = [[cell.strip() for cell in line.strip("|").split("|")]
                         for line in result.out.splitlines() if line.startswith("| ")]
    assert head[2] == "Frechet" and [one[2], two[2]] == [mine for mine, _ in found]
    assert head[-4:] == ["1x1", "2x2", "3x3", "4x4"] and two[-2] == "" and "%" in one[-2] + two[-1]


def test_l2_normalised_codes_compare_directions_and_stay_on_the_sphere():
    study = import_module("experiments.tokenizer")
    torch.manual_seed(0)
    quantizer = study.DirectionQuantizer(8, 3).train()
    x = torch.randn(200, 3)
    for _ in range(3):
        _, idx, _ = quantizer(x)
    assert torch.allclose(quantizer.codebook.norm(dim=1), torch.ones(8), atol=1e-5)
    cosine = torch.nn.functional.normalize(x, dim=1) @ quantizer.codebook.t()
    assert torch.equal(quantizer.nearest(x), cosine.argmax(1))
    assert torch.equal(quantizer.nearest(x), quantizer.nearest(7 * x))


@given(n=st.integers(1, 40))
def test_sides_of_the_cost_study_grow_from_1_to_n_by_no_more_than_double(n):
    sides = cost.next_scale(n)
    assert sides[0] == 1 and sides[-1] == n and list(sides) == sorted(set(sides))
    assert all(b <= 2 * a for a, b in zip(sides, sides[1:]))
    assert cost.next_scale(8) == (1, 2, 3, 4, 6, 8), "the layout of the shapes"


@given(blocks=st.lists(st.integers(1, 5), min_size=1, max_size=6))
def test_products_of_attention_are_those_of_the_mask_and_of_starting_over(blocks):
    owner = [k for k, side in enumerate(blocks) for _ in range(side * side)]
    looks = sum(a >= b for a in owner for b in owner)
    assert cost.products(blocks, cached=True) == looks
    again = sum(sum(o <= k for o in owner) ** 2 for k in range(len(blocks)))
    assert cost.products(blocks, cached=False) == again


def test_the_cost_study_finds_exponents_and_draws_its_figure(monkeypatch, tmp_path, capsys):
    assert cost.exponent([8, 16, 32], [n ** 2.5 for n in (8, 16, 32)]) == pytest.approx(2.5)
    counted = [cost.products((1,) * n * n, cached=False) for n in (8, 16, 32)]
    assert cost.exponent([8, 16, 32], counted) == pytest.approx(6, abs=0.1), "the paper's O(n^6)"
    monkeypatch.setattr(sys, "argv", ["cost.py", "--sides", "2", "3", "4", "--depth", "1",
                                      "--width", "64", "--out", str(tmp_path / "out" / "c.png")])
    cost.main()
    out = capsys.readouterr().out
    assert "| 4 | 30 and 16 | 4 and 16 |" in out and "seconds grow as n^" in out
    with Image.open(tmp_path / "out" / "c.png") as image:
        assert len(image.getcolors(9999)) > 5


def test_the_benchmark_prints_all_its_tables(monkeypatch, capsys):
    """At sizes that take a second; what a GPU would be asked too."""
    small = dict(vars(benchmark.vqvae.TokenizerConfig(channels=8, vocab_size=64)))
    monkeypatch.setattr(benchmark, "SCALES", small["scales"])
    monkeypatch.setattr(benchmark.released, "TOKENIZER", small)
    monkeypatch.setattr(benchmark, "var_config", lambda depth: benchmark.transformer.VARConfig(
        num_classes=5, depth=1, width=64, heads=1, vocab_size=64))
    monkeypatch.setattr(benchmark, "PICTURE", 32)
    device = benchmark.torch.device("cpu")
    found, U, memory = benchmark.original_sizes(device, 1)
    benchmark.print_original_sizes(found, U, memory)
    benchmark.gpu(device, depths=(1,), batch=4, repeats=1)
    benchmark.half_precision(20)
    out = capsys.readouterr().out
    stay, before, after, apart = map(float, re.search(
        r"(\d+\.\d)% of the tokens stay.* (\d+\.\d+) -> (\d+\.\d+) dB;.* (\d+\.\d) dB",
        out).groups())
    assert 75 < stay < 100 and abs(before - after) < 0.3 and before > 30 and 45 < apart < 80
    assert all(f"| {name} |" in out for name in benchmark.ORIGINAL)
    assert "| 1 | 4 | off |" in out and "| 1 | 4 | on |" not in out and "| prefix |" in out
    for times in found.values():
        assert set(times) >= {"float32", "plain"} and all(t > 0 for t in times.values())
    assert benchmark.mask.block_causal_attention is not benchmark.hide_afterwards, "put back"


def test_the_cifar10_study_trains_asks_the_judge_and_prints_what_they_said(
        cli, tiny, tmp_path, monkeypatch):
    """With the tiny run in place of CIFAR-10, whose two chapters are really called."""
    judge, commands = import_module("report.judge"), []
    real = import_module("data.registry").load_data
    torch.manual_seed(0)
    network = judge.Judge(3, 16).eval()
    network.body[-2].weight.data.mul_(300)                 # distances with digits before the point
    monkeypatch.setattr(judge, "load_or_train", lambda *args, **how: network)
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
    result = cli("experiments.cifar10.py", "--n", 12, "--cfg", 0, 2.5, "--device", "cpu", "--out",
                 run := tmp_path / "run", "--export", exported := tmp_path / "both.pt")
    assert result.status == 0, result.err
    log = (run / "log.jsonl").read_text()
    assert '"stage": "transformer", "step": 24' in log and exported.exists()
    assert [c[c.index("--cfg") + 1] for c in commands if "--cfg" in c] == ["0.0", "2.5"]
    assert re.search(r"^tokenizer: steps 0 to 24 in \d+ s; [\d,]+ pictures/s, ", result.out, re.M)
    lines = {line.split(" | ")[0].strip("| "): line.strip("| ").split(" | ")[1:]
             for line in result.out.splitlines() if line.startswith("| ")}
    held = cifar.held_out(run, "transformer")
    assert lines["cross-entropy, nats a token (2,000 pictures)"][-1] == f"{held['loss']:.3f}"
    usage = cifar.held_out(run, "tokenizer")
    assert lines["codes used"] == [f"{x:.0%}" for x in [*usage["used"], usage["used_overall"]]]
    judged = [lines[name] for name in ("held-out pictures (floor)", "reconstructions",
                                       "samples, cfg 0", "samples, cfg 2.5")]
    assert all(len(numbers) == 4 for numbers in judged)
    assert all(f"\n{cfg}: nearest of 57 training" in result.out for cfg in ("cfg 0", "cfg 2.5"))
    again = cli("experiments.cifar10.py", "--n", 12, "--cfg", 0, "--device", "cpu", "--out", run)
    assert "tokenizer: trained for 24 steps; 1 s with" in again.out


@pytest.mark.parametrize("options", ["--n 3", "--n -5", "--cfg -1", "--cfg nan", "--dry-run"])
def test_a_wrong_option_of_the_cifar10_study_is_one_line(refused, monkeypatch, options):
    monkeypatch.setattr(cifar, "call", lambda *_: ("a plan", 1.0))
    refused("experiments.cifar10.py", *options.split())


def test_the_cifar10_study_stops_where_a_chapter_does(refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "05_train.py ended with exit status 2" in refused(
        "experiments.cifar10.py", "--data-dir", tmp_path, "--device", "cpu", "--out", tmp_path)
