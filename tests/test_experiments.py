"""The experiments behind the tables: the right things are compared."""
import json
import math
import re
from importlib import import_module
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, random_models, seeded, stage_of
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from data.batches import to_float

benchmark, cost = import_module("experiments.benchmark"), import_module("experiments.cost")
masking, models = import_module("03_block_causal_mask"), import_module("04_var_transformer")
tokenizers, scaling = import_module("02_multiscale_vqvae"), import_module("experiments.scaling")
ablation = import_module("experiments.ablation")
weighing = import_module("experiments.loss_weights")
cifar, rows = import_module("experiments.cifar10"), import_module("experiments.tokenizer")
judge, infinity = import_module("report.judge"), import_module("experiments.infinity")
correction = import_module("experiments.self_correction")
Processes = import_module("engine.processes").Processes
generability = import_module("experiments.generability")
SMALL = ("--dataset shapes --image-size 16 --set scales=1,2,3,4 multipliers=1,2 unshuffle=2 "
         "--vocab-size 16 --set latent_dim=4 channels=8 groups=4 --tokenizer-batch-size 2 "
         "--tokenizer-steps 5 --set held_out=8 --device cpu --precision float32").split()


def judge_without_training(monkeypatch, classes):
    torch.manual_seed(0)
    network = judge.Judge(classes, 16).eval()
    network.body[-2].weight.data.mul_(300)                 # distances with digits before the point
    monkeypatch.setattr(judge, "judge_of", lambda *args, **how: network)


def table(text):
    """Cells of the rows of a table, without the line under its head."""
    lines = [line.strip("| ").split("|") for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line] for line in lines if set(line[1].strip()) != {"-"}]


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


def changed_at(tokenizer, last):
    """A change of tokens: map `last` gets other codes, all others stay."""
    return lambda k, tokens: (tokens + 1) % tokenizer.config.vocab_size if k == last else tokens


@pytest.mark.parametrize("residual", (True, False))
def test_labels_are_before_an_error_and_correct_those_before_inputs_are_after_it(residual):
    tokenizer, _ = random_models(scales=(1, 2, 3, 4))
    tokenizer.config.residual = residual
    f, everything = torch.randn(3, 4, 4, 4), {}
    for last in (None, 0, 1, 2, 3):
        change = changed_at(tokenizer, last)
        labels, inputs = correction.requantize(tokenizer, f, change)
        shown = [change(k, tokens) for k, tokens in enumerate(labels)]
        assert torch.equal(inputs, tokenizer.teacher_inputs(shown))
        for k in range(4):                                 # what Algorithm 1 says of any prefix
            missing = f - tokenizer.features(shown[:k]) if k and residual else f
            nearest = tokenizer.quantizer.nearest(tokenizer.downsample_to(missing, k))
            assert torch.equal(labels[k], nearest)
        everything[last] = labels
    tokens = tokenizer.quantize(f)
    for last, labels in everything.items():
        same = [torch.equal(a, b) for a, b in zip(labels, tokens)]
        assert same == [not residual or last is None or k <= last for k in range(4)]
    labels, inputs = correction.keep_labels(tokenizer, f, changed_at(tokenizer, 1))
    wrong = [changed_at(tokenizer, 1)(k, part) for k, part in enumerate(tokens)]
    assert all(map(torch.equal, labels, tokens))
    assert torch.equal(inputs, tokenizer.teacher_inputs(wrong))


def test_later_maps_undo_much_of_an_error_if_they_know_of_it():
    tokenizer = import_module("05_train").load_tokenizer(ROOT / "data/pretrained/shapes.pt")[0]
    images = import_module("data.shapes").draw(range(20))[0]
    with torch.no_grad():
        f = tokenizer.float().encode(to_float(torch.from_numpy(images)))
    neighbours, errors = correction.neighbours_of(tokenizer.quantizer.codebook, 10), []
    for method in (correction.requantize, correction.keep_labels):
        torch.manual_seed(0)
        shown = []
        method(tokenizer, f, lambda k, tokens: shown.append(
            correction.exchange(tokens, 0.3, neighbours)) or shown[-1])
        errors.append((tokenizer.features(shown) - f).square().mean((1, 2, 3)))
    assert (errors[0] < errors[1]).all() and errors[0].mean() < 0.5 * errors[1].mean()


def test_tokens_are_exchanged_for_near_codes_at_the_rate_of_their_image():
    codes = torch.tensor([[0.0], [1], [3], [7]])
    assert correction.neighbours_of(codes, 1).tolist() == [[1], [0], [1], [2]]
    assert [set(row) for row in correction.neighbours_of(codes, 2).tolist()] == [
        {1, 2}, {0, 2}, {0, 1}, {1, 2}]
    torch.manual_seed(0)
    tokens, rate = torch.randint(4, (3, 5000)), torch.tensor([[0.0], [0.3], [1.0]])
    near = correction.neighbours_of(codes, 2)
    found = correction.exchange(tokens, rate, near)
    assert (found != tokens).float().mean(1).tolist() == pytest.approx([0, 0.3, 1], abs=0.02)
    seen = set(zip(tokens[2].tolist(), found[2].tolist()))
    assert seen == {(a, b) for a in range(4) for b in near[a].tolist()}


@pytest.mark.parametrize("correct", (True, False))
def test_a_corrupting_stage_trains_on_errors_and_is_evaluated_without(correct, monkeypatch):
    """Without errors its loss is chapter 5's. Every image has one rate of its own, in all maps."""
    torch.manual_seed(1)
    f, rates, stage = torch.randn(32, 4, 4, 4), [], stage_of("transformer")
    stage.model.eval()                                     # no dropout
    for p in stage.model.parameters():
        p.data += 0.1 * torch.randn(p.shape)
    before, classes = stage.evaluate()[1]["loss"], torch.arange(32) % 3
    tokens = torch.cat(stage.tokenizer.quantize(f), 1)
    plain = stage.per_token(stage.model, tokens, classes)[0].mean().item()
    monkeypatch.setattr(correction, "exchange", lambda tokens, rate, neighbours: (
        rates.append(rate) or (tokens + neighbours) % 16))
    found = {}
    for step in 0, 1:
        stage.__class__ = correction.corrupting(lambda: f, 0.3, correct, step)
        loss, (by_token, _) = stage.loss(stage.model, stage.rows("train", np.arange(32)), 0.5)
        assert stage.evaluate()[1]["loss"] == before and loss.requires_grad
        assert by_token.mean().item() == pytest.approx(loss.item())
        found[step] = loss.item()
    method = correction.requantize if correct else correction.keep_labels
    labels, inputs = method(stage.tokenizer, f, lambda k, tokens: (tokens + 1) % 16)
    logits, labels = stage.model(classes, inputs), torch.cat(labels, 1)
    expected = -logits.log_softmax(-1).gather(2, labels[..., None]).mean().item()
    assert found == pytest.approx({0: plain, 1: expected}) and abs(plain - expected) > 1e-4
    assert len(rates) == 6 and all(torch.equal(rate, rates[0]) for rate in rates[:3])
    assert rates[0].shape == (32, 1) and len(set(rates[0].flatten().tolist())) == 32
    assert 0 <= rates[0].min() < 0.1 and 0.2 < rates[0].max() <= 0.3


def test_features_are_in_the_order_of_the_token_cache(monkeypatch):
    tokenizer, n = random_models()[0], 6
    monkeypatch.setattr(import_module("data.views"), "per_pass", lambda side: 4)
    images = np.random.default_rng(0).integers(0, 256, (n, 16, 16, 3), dtype=np.uint8)
    trial = SimpleNamespace(settings=SimpleNamespace(views=3), data={"train": (images, None)},
                            precision="float32", processes=SimpleNamespace(device="cpu"))
    found = correction.features.__wrapped__(trial, tokenizer, "train")
    assert found.shape == (3 * n, 4, 4, 4)
    for row in range(3 * n):
        image = to_float(torch.from_numpy(images[[row % n]]))
        view = import_module("data.views").view_of(image, row // n, np.array([row % n]), n)
        assert torch.allclose(found[row], tokenizer.encode(view)[0], atol=1e-5)


def test_prefixes_without_an_error_cost_as_much_as_real_ones(monkeypatch):
    """Nothing is exchanged, and the model draws the real tokens."""
    tokenizer, var = random_models(noise=0.5)
    f, classes = torch.randn(5, 4, 4, 4), torch.arange(5) % 3
    neighbours = correction.neighbours_of(tokenizer.quantizer.codebook, 3)
    torch.manual_seed(0)
    found = correction.bits_by_prefix(tokenizer, var, f, classes, neighbours, 0.5)
    real = correction.drawing.log_likelihood(tokenizer, var, tokenizer.quantize(f), classes)
    assert torch.allclose(found["real"], -real / math.log(2), atol=1e-4)
    assert torch.equal(found["drawn"][:, 0], found["real"][:, 0])
    assert torch.equal(found["exchanged"][:, 0], found["real"][:, 0])
    for name in ("exchanged", "drawn", "own"):
        assert (found[name][:, 1:] != found["real"][:, 1:]).float().mean() > 0.5, name
    tokens = iter(tokenizer.quantize(f) * 2)
    monkeypatch.setattr(correction.drawing, "draw", lambda *_: next(tokens))
    found = correction.bits_by_prefix(tokenizer, var, f, classes, neighbours, 0)
    for name in ("exchanged", "drawn", "own"):
        assert torch.allclose(found[name], found["real"], atol=1e-4), name


@pytest.mark.slow
def test_self_correction_prints_a_row_for_each_training(cli, tmp_path):
    first, again = (cli("experiments.self_correction.py", "--quick", "--out", "o")
                    for _ in range(2))
    assert first.status == 0, first.err
    head, *found, floor = table(first.out)
    assert [row[0] for row in found] == list(correction.ROWS) and floor[1:5] == [""] * 4
    held_out = re.findall(r"held out at step 3: loss ([\d.]+)", first.out)
    assert len(held_out) == 4 and "held out" not in again.out
    assert table(again.out) == table(first.out)
    folder = tmp_path / "o/self_correction/shapes-quick"
    kept = [json.loads((folder / row / "0.json").read_text())["found"] for row in correction.ROWS]
    assert len({found["real"] for found in kept}) == 4, "no two trainings are alike"
    assert all(sum(found[f"{name} by map"]) == pytest.approx(found[name])
               for found in kept for name in correction.PREFIXES)
    assert (folder / "self_correction.png").exists()


@pytest.mark.slow
def test_scales_share_a_tokenizer_where_only_attention_differs(cli, tmp_path):
    first, again = (cli("experiments.scales.py", "--quick", "--seeds", 1) for _ in range(2))
    head, *found = table(first.out)
    assert first.status == 0, first.err
    *found, floor = [dict(zip(head, row)) for row in found]
    assert [row["tokens"] for row in found] == "64 65 81 85 130 130 130".split()
    assert len({row["PSNR, dB"] for row in found}) == 6, "a tokenizer each, but for Markov"
    assert found[4]["PSNR, dB"] == found[6]["PSNR, dB"]
    kept = [json.loads(path.read_text())["found"]["bits"] for path in
            tmp_path.glob("out/experiments/scales/shapes-quick/K*/0.json")]
    assert len(set(kept)) == len(kept) == 7
    assert floor["scales"] == "held-out images" and "3/3" not in again.out
    assert table(again.out) == table(first.out), "nothing is trained or judged again"
    assert (tmp_path / "out/experiments/scales/shapes-quick/scales.png").exists()


def test_a_markov_map_attends_to_itself_alone(monkeypatch):
    """Like chapter 4's transformer under a dense block-diagonal mask, and like its own sampling."""
    scales = import_module("experiments.scales")
    _, var = random_models(label_dropout=1.0, drop_path=0.0)
    markov = scales.MarkovVAR(var.config).eval()
    markov.load_state_dict(var.state_dict())
    labels, inputs = torch.tensor([0, 2]), torch.randn(2, var.L - 1, 4, generator=seeded())
    found, causal = markov(labels, inputs), var(labels, inputs)
    scale = masking.scale_of_token(var.config.scales)
    same = scale[:, None] == scale[None, :]
    monkeypatch.setattr(masking, "block_causal_attention", lambda q, k, v, scales, mask, factor:
                        masking.attention(q, k, v, same, factor))
    assert torch.allclose(found, var(labels, inputs), atol=1e-5)
    assert (found - causal)[:, 1:].abs().amax(2).min() > 1e-3, "only the first map is as before"
    cache, conditioning = markov.new_cache(), markov.conditioning(labels)
    parts = [None, *inputs.split([4, 16], 1)]
    drawn = [markov.step(k, parts[k], conditioning, cache) for k in range(3)]
    assert torch.allclose(torch.cat(drawn, 1), found, atol=1e-5)
    # Labels are hidden in training, here all of them, and never otherwise.
    assert torch.allclose(markov.train()(labels, inputs), var(torch.tensor([3, 3]), inputs),
                          atol=1e-5)


@pytest.mark.slow
def test_generability_trains_a_tokenizer_and_a_transformer_a_row(cli, tmp_path):
    first, again = (cli("experiments.generability.py", "--quick", "--seeds", 1, "--out", "o")
                    for _ in range(2))
    assert first.status == 0, first.err
    head, *found, floor, ranks = table(first.out)
    assert [row[0] for row in found] == list(generability.ROWS)
    assert floor[2] == floor[5] and all(-1 <= float(rank) <= 1 for rank in ranks[1:5])
    for key, paths in (("psnr", "tokenizers/*/0.json"), ("bits", "*/0.json")):
        kept = [json.loads(path.read_text())["found"] for path in
                tmp_path.glob(f"o/generability/shapes-quick/{paths}")]
        kept = [numbers[key] for numbers in kept if key in numbers]
        assert len(set(kept)) == len(kept) == 8, "no two rows are alike"
    assert "3/3" not in again.out and table(again.out) == table(first.out)
    assert (tmp_path / "o/generability/shapes-quick/generability.png").exists()


def test_what_the_decoder_is_shown_changes_nothing_else_and_only_in_training():
    stage, shown = stage_of("tokenizer", learn="ema"), []
    model, image = stage.model.train(), torch.rand(4, 3, 16, 16) * 2 - 1
    model(image)                                           # places the codes
    before = model(image)
    other, decode = torch.randn(4, 4, 4, 4), model.decode
    generability.decoder_sees(lambda *_: other)(stage)
    model.decode = lambda f_hat: shown.append(f_hat) or decode(f_hat)
    after = model(image)
    assert torch.allclose(shown[-1], other, atol=1e-5)
    assert all(map(torch.equal, before[1], after[1]))
    assert torch.equal(before[2]["vq"], after[2]["vq"])
    assert not torch.equal(before[2]["reconstruction"], after[2]["reconstruction"])
    after[2]["reconstruction"].backward()
    assert model.encoder.conv_in.weight.grad.abs().max() > 0, "straight through"
    model.eval()(image)
    assert torch.allclose(shown[-1], model.features(model.image_to_tokens(image)), atol=1e-5)


def test_dropped_maps_and_perturbed_tokens_have_their_shares():
    model, _ = random_models(scales=(1, 2, 4), V=16)
    torch.manual_seed(0)
    tokens = [torch.randint(16, (2000, side * side)) for side in (1, 2, 4)]
    steps = torch.stack(model.pyramid(tokens))
    for share, expected in ((0, [0, 0, 1]), (0.6, [0.2, 0.2, 0.6]), (1, [1 / 3] * 3)):
        found = generability.first_maps(share)(model, tokens)
        is_step = (found == steps).all((2, 3, 4))          # (K, images)
        assert is_step.sum(0).eq(1).all(), "every image is what some of its maps make"
        assert is_step.float().mean(1).tolist() == pytest.approx(expected, abs=0.04)
    model.features = lambda tokens: tokens
    distance = torch.cdist(model.quantizer.codebook, model.quantizer.codebook)
    rank = distance.argsort(1).argsort(1)                  # 0: the code itself
    for before, after in zip(tokens, generability.perturbed(model, tokens)):
        ranks = rank[before, after]
        assert (ranks > 0).float().mean() == pytest.approx(0.1, abs=0.02)
        assert ranks.unique().tolist() == [0, 1, 2, 3, 4], "V / 4 of 16 codes"


def test_a_rank_correlation_by_hand():
    assert generability.rank_correlation([1, 2, 30], [10, 20, 5]) == pytest.approx(-0.5)
    assert generability.rank_correlation([3, 1, 2], [9, 4, 8]) == pytest.approx(1)


# -- Bitwise modelling -----------------------------------------------------------------------------

def bit_tokenizer(bits, scales=(1, 2, 4)):
    """Untrained, with codes of about the size of a random f, and phi without a convolution."""
    torch.manual_seed(0)
    side = scales[-1] * 4
    tokenizer = infinity.vqvae.MultiScaleVQVAE(infinity.vqvae.TokenizerConfig(
        image_size=side, scales=scales, channels=8, groups=4, quantizer="bits", vocab_size=2,
        latent_dim=bits)).eval().requires_grad_(False)
    for phi in tokenizer.phis:
        torch.nn.init.dirac_(phi.weight)
        phi.bias.zero_()
    tokenizer.quantizer.size = 0.5
    return tokenizer


def bit_transformer(bits, scales):
    torch.manual_seed(1)
    var = infinity.BitwiseVAR(infinity.transformer.VARConfig(
        num_classes=2, scales=scales, vocab_size=2, latent_dim=bits, depth=2, width=16,
        heads=2)).eval().requires_grad_(False)
    for p in var.parameters():                             # shut gates would prove nothing
        p.add_(0.3 * torch.randn_like(p))
    return var


def test_bits_side_by_side_are_the_index_of_chapter_1():
    bits, index = infinity.BitQuantizer(9), infinity.vq.LookupFreeQuantizer(9)
    x = torch.randn(2, 5, 9)
    tokens, idx = bits.nearest(x), index.nearest(x)
    written = ["".join(str(int(bit)) for bit in row[::-1]) for row in
               tokens.view(10, 9).numpy()]                 # bit 0 is written last
    assert [int(text, 2) for text in written] == idx.flatten().tolist()
    assert torch.equal(bits.lookup(tokens), index.lookup(idx))
    assert torch.equal(bits.extra_loss(x), index.extra_loss(x))
    tokenizer, image = bit_tokenizer(9), torch.randn(2, 3, 16, 16)
    tokenizer.quantizer.size = index.size
    again = infinity.with_indices(tokenizer)
    assert [t.shape for t in again.image_to_tokens(image)] == [(2, 1), (2, 4), (2, 16)]
    assert torch.equal(*(t.tokens_to_image(t.image_to_tokens(image)) for t in (tokenizer, again)))


@pytest.mark.parametrize("bits, scales", [(3, (1,)), (2, (1, 2))])
def test_the_bitwise_likelihood_of_all_images_sums_to_1(bits, scales):
    """2^3 images of one vector; 2^10 of five vectors in two maps."""
    tokenizer, var = bit_tokenizer(bits, scales), bit_transformer(bits, scales)
    count = bits * sum(side * side for side in scales)
    every = torch.arange(2 ** count)[:, None] >> torch.arange(count) & 1
    maps = list(every.split([bits * side * side for side in scales], 1))
    p = infinity.drawing.log_likelihood(tokenizer, var, maps, torch.ones(len(every)).long())
    assert float(p.sum(1).exp().sum()) == pytest.approx(1, abs=1e-4)
    assert p.sum(1).std() > 0.1


def test_two_outputs_a_bit_and_a_temperature_for_each_scale():
    """2^32 codes take 64 outputs; the cold map is the likeliest one, the hot one is noise."""
    tokenizer, var = bit_tokenizer(32), bit_transformer(32, (1, 2, 4))
    assert var.head.out_features == 64
    labels = torch.zeros(200).long()
    cold, _, hot = infinity.drawing.sample_tokens(
        tokenizer, infinity.Cooled(var, [1e-6, 1, 1e6]), labels)
    first = var.step(0, None, var.conditioning(labels), var.new_cache())
    assert first.shape == (200, 32, 2) and torch.equal(cold, first.argmax(-1))
    assert hot.shape == (200, 16 * 32) and abs(hot.float().mean(0) - 0.5).max() < 0.2


def test_after_a_flip_finer_maps_correct_the_mistake():
    """Labels are the bits before they flip, inputs come from those after; without flips both are
    chapter 2's."""
    tokenizer = bit_tokenizer(6)
    f = torch.randn(8, 6, 4, 4)
    clean = tokenizer.quantize(f)
    labels, inputs = infinity.flipped_rounds(tokenizer, f, torch.zeros(8, 3))
    assert torch.equal(labels, torch.cat(clean, 1))
    assert torch.equal(inputs, tokenizer.teacher_inputs(clean))
    labels, inputs = infinity.flipped_rounds(tokenizer, f, torch.tensor([[1.0, 0, 0]]).repeat(8, 1))
    first, *finer = labels.split([6, 24, 96], 1)
    assert torch.equal(first, clean[0])
    assert torch.equal(inputs, tokenizer.teacher_inputs([1 - first, *finer]))
    corrected, stale = ((f - tokenizer.features([1 - first, *maps])).square().sum((1, 2, 3))
                        for maps in (finer, clean[1:]))
    assert (corrected < 0.8 * stale).all()
    labels, _ = infinity.flipped_rounds(tokenizer, f, torch.tensor([[0, 0, 1.0]]).repeat(8, 1))
    assert torch.equal(labels, torch.cat(clean, 1)), "no map comes after the last"


def test_bits_flip_in_training_only_and_the_loss_is_the_likelihood_of_a_bit():
    tokenizer = bit_tokenizer(4)
    images, labels = torch.randint(256, (6, 16, 16, 3), dtype=torch.uint8).numpy(), [0, 1] * 3
    data = {split: (images, np.array(labels)) for split in ("train", "test")}
    settings = infinity.training.Settings(precision="float32")
    stage = infinity.bitwise(0.3)(settings, Processes("cpu"), tokenizer,
                                  bit_transformer(4, (1, 2, 4)).config, data, ["a", "b"])
    stage.model.load_state_dict(bit_transformer(4, (1, 2, 4)).state_dict())
    image, classes = stage.rows("test", np.arange(6))
    stage.model.eval()
    loss = float(stage.loss(stage.model, (image, classes), 0.5)[0].detach())
    p = infinity.drawing.log_likelihood(tokenizer, stage.model, tokenizer.image_to_tokens(image),
                                        classes)
    assert loss == pytest.approx(float(-p.sum(1).mean()) / (21 * 4), rel=1e-5)
    stage.model.train()
    stage.model.config.label_dropout = 0
    flipped = stage.loss(stage.model, (image, classes), 0.5)[0].detach()
    assert abs(float(flipped) - loss) > 1e-3


@pytest.mark.slow
def test_the_infinity_experiment_prints_its_table(cli):
    result = cli("experiments.infinity.py", "--quick", "--seeds", 1)
    assert result.status == 0, result.err
    head, *found, floor = table(result.out)
    assert {len(row) for row in [*found, floor]} == {len(head)}
    assert [row[3] for row in found] == ["512", "512", "18", "32", "64", "32"]
    spent, possible = zip(*(row[4].split(" of ") for row in found))
    assert possible == ("1,170", "1,170", "1,170", "2,080", "4,160", "2,080")
    assert all(0.9 * float(p.replace(",", "")) < float(bits) for bits, p in zip(spent, possible))
    assert len(set(spent)) == 6 and found[1][1] == found[2][1] != found[0][1]
QUICK = ("--quick", "--out", "experiments")


def quick_table(cli, script):
    """The first table that an experiment prints with --quick. -> its head, its rows"""
    result = cli(script, *QUICK)
    assert result.status == 0, result.err
    first = re.search(r"(^\|.*\|\n)+", result.out, re.M)[0].splitlines()
    head, _, *found = [[cell.strip() for cell in line[1:-1].split("|")] for line in first]
    assert all(len(row) == len(head) for row in found)
    assert "wrote " in result.out
    return head, found


def test_weights_of_the_loss_have_mean_1_and_share_it_as_promised():
    scales = (1, 2, 4)
    token, side, scale = (weighing.weights(scales, power) for power in (0, 1, 2))
    assert token.tolist() == [1.0] * 21
    assert [float(part.sum()) for part in scale.split([1, 4, 16])] == pytest.approx([7, 7, 7])
    assert side.split([1, 4, 16])[1][0] == pytest.approx(2 * side[-1])
    assert side.mean() == pytest.approx(1)


@pytest.mark.slow
def test_rows_of_the_loss_weights_differ_and_are_kept(cli):
    first, again = (quick_table(cli, "experiments.loss_weights.py") for _ in range(2))
    assert first == again and [row[0] for row in first[1]][:3] == list(weighing.POWERS)
    assert first[1][0][1] != first[1][2][1], "bits of two losses"


def one_map(side, C=4):
    torch.manual_seed(0)
    config = tokenizers.TokenizerConfig(image_size=16, scales=(side,), vocab_size=16, latent_dim=C,
                                        channels=8, groups=4)
    return tokenizers.MultiScaleVQVAE(config).eval()


def test_raster_order_is_shown_the_code_before_in_training_as_in_sampling():
    """And the image is that of the one map."""
    tokenizer = one_map(4)
    raster = ablation.Raster(tokenizer)
    whole = tokenizer.image_to_tokens(torch.rand(2, 3, 16, 16) * 2 - 1)
    tokens = list(whole[0].split(1, 1))
    shown, f_hat = raster.teacher_inputs(tokens), 0
    for k, token in enumerate(tokens):
        f_hat, after = raster.next_input(k, f_hat, token)
        assert after is None if k == 15 else torch.equal(after[:, 0], shown[:, k])
    assert torch.equal(shown[1, 6], tokenizer.quantizer.codebook[whole[0][1, 6]])
    assert torch.equal(raster.tokens_to_image(tokens), tokenizer.tokens_to_image(whole))


def test_of_a_class_token_later_tokens_learn_by_attention_alone():
    """Without its row the class changes nothing; with AdaLN it still would."""
    config = models.VARConfig(scales=(1,) * 4, vocab_size=8, latent_dim=4, depth=2, width=16,
                              heads=2, shared_adaln=True, num_classes=3)
    labels, inputs = torch.tensor([0, 1]), torch.randn(1, 3, 4).expand(2, -1, -1)
    moved = []
    for kind in (ablation.ClassToken, models.VAR):
        torch.manual_seed(0)
        var = kind(config).eval()
        torch.nn.init.normal_(var.head.weight)
        for p in var.parameters():
            p.data.add_(0.1 * torch.randn_like(p))
        with torch.no_grad():
            conditioning = var.conditioning(labels)
            alike = conditioning._replace(row=conditioning.row[:1].expand(2, -1, -1))
            for told in (conditioning, alike):
                var.conditioning = lambda labels, told=told: told
                logits = var(labels, inputs)
                moved.append(float((logits[0] - logits[1]).abs().max()))
    assert moved[0] > 1e-3 and moved[1] == 0 and moved[2] > 1e-3 and moved[3] > 1e-3


@pytest.mark.slow
def test_rows_of_the_ablation_and_which_of_them_share_a_training(cli):
    head, found = quick_table(cli, "experiments.ablation.py")
    sizes, bits = ([row[head.index(name)] for row in found]
                   for name in ("parameters, M", "bits an image"))
    assert len(found) == 10 and bits[2] == bits[3] == bits[4]
    assert sizes[1] < sizes[2] and bits[5] > bits[6]
    assert float(bits[0]) < 64 * 9 < float(bits[1]), "tokens of 9 bits"


def test_a_power_law_is_found_again():
    x = [1.0, 2, 5, 10, 30]
    a, half, correlation = scaling.power_law(x, [3 * n ** -0.25 for n in x])
    assert a == pytest.approx(0.25) and half < 1e-6 and correlation == pytest.approx(-1)
    # By hand: logarithms 0, 1, 2 and 0, -1, -1: slope -1/2, residuals 1/6, -1/3, 1/6.
    e = 2.718281828459045
    a, half, _ = scaling.power_law([1, e, e * e], [1, 1 / e, 1 / e])
    assert a == pytest.approx(0.5) and half == pytest.approx(12.71 * (1 / 6 / 2) ** 0.5)


def test_operations_are_counted_by_hand():
    """One token, D = 4, V = 8, hidden 16: qkv 48, projection 16, MLP 128, head 32."""
    var = models.VAR(models.VARConfig(scales=(1,), vocab_size=8, latent_dim=4, depth=1, width=4,
                                      heads=1))
    assert scaling.operations(var) == 6 * (48 + 16 + 128 + 32) + 12 * 4


@pytest.mark.slow
def test_more_parameters_are_more_arithmetic_and_another_loss(cli):
    head, found = quick_table(cli, "experiments.scaling.py")
    sizes, losses = [float(row[1]) for row in found], {row[3] for row in found}
    assert len(found) == 4 and sizes == sorted(sizes) and len(losses) == 4


# -- guidance.py -----------------------------------------------------------------------------------

@pytest.mark.slow
def test_rows_of_guidance_differ_in_samples_and_cost_and_are_drawn_once(cli, tmp_path):
    first, again = (cli("experiments.guidance.py", "--quick", "--cfg", "1.5") for _ in range(2))
    assert first.status == 0, first.err
    head, *rows = table(first.out)
    names = [row[0] for row in rows]
    off = [f"off from {side}x{side}" for side in (8, 6, 4, 3, 2)]
    assert names == ["none", "ramp 1.5", *(f"ramp 1.5, {x}" for x in off[:4]), "constant 1.5",
                     *(f"constant 1.5, {x}" for x in off),
                     *(f"constant 1.5, {x.replace('off', 'on')}" for x in off[::-1]),
                     "held-out images", "their reconstructions"]
    tokens = [row[1] for row in rows[:-2]]
    assert tokens == "130 260 196 160 144 135 260 196 160 144 135 131".split() + ["260"] * 5
    folder = tmp_path / "out/experiments/guidance/shapes-quick"
    frechet = [json.loads((folder / name / "0.json").read_text())["found"]["frechet"]
               for name in ("none", "ramp 1.5", "constant 1.5", "constant 1.5, off from 8x8",
                            "constant 1.5, on from 8x8")]
    assert len(set(frechet)) == 5, "the same noise, but other strengths"
    assert table(again.out) == table(first.out) and (folder / "guidance.png").exists()


def test_guidance_by_hand_and_the_tokens_that_the_transformer_sees():
    guidance = import_module("experiments.guidance")
    curves = guidance.schedules([1, 4], (1, 2, 4))
    assert curves == {
        "ramp 1": {"ramp 1": [0, 0.5, 1], "ramp 1, off from 4x4": [0, 0.5, 0]},
        "constant 1": {"constant 1": [1, 1, 1], "constant 1, off from 4x4": [1, 1, 0],
                       "constant 1, off from 2x2": [1, 0, 0]},
        "ramp 4": {"ramp 4": [0, 2, 4], "ramp 4, off from 4x4": [0, 2, 0]},
        "constant 4": {"constant 4": [4, 4, 4], "constant 4, off from 4x4": [4, 4, 0],
                       "constant 4, off from 2x2": [4, 0, 0]},
        "late": {"constant 4, on from 2x2": [0, 4, 4], "constant 4, on from 4x4": [0, 0, 4]}}
    tokenizer, var = random_models()
    seen = []
    var.head.register_forward_hook(lambda layer, given, logits: seen.append(logits[..., 0].numel()))
    for t in [[0, 0, 0], *(t for rows in curves.values() for t in rows.values())]:
        seen.clear()
        guidance.drawing.sample_tokens(tokenizer, var, torch.tensor([2, 0, 1]), cfg=t)
        assert sum(seen) == 3 * guidance.tokens_computed(t, tokenizer.scales)


def test_flips_and_temperatures_out_of_range_are_one_line(refused):
    for options in ("--flips 1.5", "--flips nan", "--cool 0", "--cool nan"):
        assert "--flips" in refused("experiments.infinity.py", "--quick", *options.split())
