"""The dry run: counted by hand, measured on real models, and nothing else happens."""
import re
from importlib import import_module

import pytest
import torch
from conftest import TINY
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import plan

m2, m4 = import_module("02_multiscale_vqvae"), import_module("04_var_transformer")
m5 = import_module("05_train")
SCRIPT = "05_train.py"


def days_of(text):
    """"30 s" -> 30 / 86400; likewise m, h, days"""
    count, unit = text.split()
    return float(count) / {"s": 86400, "m": 1440, "h": 24, "days": 1}[unit]


@pytest.fixture
def dry(cli):
    """dry(*options) -> {"tokenizer" or "transformer": its columns as numbers}, days, all text"""
    def call(*options):
        result = cli(SCRIPT, *options, "--dry-run")
        assert (result.status, result.err, result.started) == (0, "", []), result
        rows = {name: [*map(float, re.sub("[M,]", "", columns).split()), days_of(time)]
                for name, columns, time in re.findall(
                    r"^(\w+) +([\d.]+ M .*?) +([\d.]+ (?:s|m|h|days))$", result.out, re.M)}
        days = days_of(re.search("^together +(.*)$", result.out, re.M)[1])
        return rows, days, result.out
    return call


@pytest.fixture
def nothing_counted(monkeypatch):
    """Dry runs of large models, in no time."""
    monkeypatch.setattr(plan.Work, "flops", lambda self: (10 ** 6, 10 ** 9, 10 ** 8))
    monkeypatch.setattr(plan.Work, "kernels", lambda self: 0)
    monkeypatch.setattr(plan.Work, "kept", lambda self, config, **flags: 10 ** 6)


# -- Nothing happens -------------------------------------------------------------------------------

def test_a_dry_run_reads_nothing_writes_nothing_and_starts_nothing(dry, tmp_path, monkeypatch):
    def touch(*_, **__):
        raise AssertionError("a dry run")
    for name in ("load_data", "train", "relaunch", "Run"):
        monkeypatch.setattr(m5, name, touch)
    rows, _, out = dry(*TINY, "--dataset", "/no/such/folder", "--out", tmp_path / "run",
                          "--gpus", 2, "--shard", "--optimizer", "adamw")
    assert not list(tmp_path.iterdir())
    assert set(rows) == {"tokenizer", "transformer"} and "nothing is read" in out
    assert max(map(len, out.splitlines())) <= 110


def test_the_columns_are_those_of_the_real_models(dry):
    rows, _, out = dry("--batch-size", 48, "--gpus", 3, "--accumulate", 2,
                       "--tokenizer-batch-size", 12)
    _, config, var = m5.read_settings([])
    for name, model, batch, steps in (
            ("tokenizer", m2.MultiScaleVQVAE(config), 12, 2000),
            ("transformer", m4.VAR(m5.var_sizes(var, config, 10)), 48, 1600)):
        millions = sum(p.numel() for p in model.parameters()) / 1e6
        assert rows[name][:4] == [pytest.approx(millions, abs=0.051), batch, batch / 3, steps]
    assert out.startswith("dry run") and "3 GPU(s) of 989 TFLOP/s, of which 40%" in out


@pytest.mark.parametrize("depth, epochs, batch", [(16, 200, 768), (20, 250, 768), (24, 350, 768),
                                                  (30, 350, 1024)])
def test_imagenet_depths_take_the_papers_epochs(dry, nothing_counted, depth, epochs, batch):
    rows, _, out = dry("--dataset", "imagenet", "--depth", depth, "--gpus", 8)
    assert rows["transformer"][1:4] == [batch, batch / 8, epochs * 1_281_167 // batch]
    assert "8 views of 1,281,167 pictures: 13.9 GB" in out      # x 680 tokens x 2 bytes


# -- Arithmetic ------------------------------------------------------------------------------------

@settings(max_examples=6)
@given(scales=st.sampled_from([(1,), (1, 2), (2, 3, 5), (1, 2, 3, 4, 5, 6, 8), (1, 2, 16)]),
       depth=st.integers(1, 3), heads=st.integers(1, 3), V=st.integers(2, 50),
       shared=st.booleans(), ratio=st.sampled_from([2.0, 4.0]))
def test_a_transformers_arithmetic_is_six_products_per_weight_and_token(
        scales, depth, heads, V, shared, ratio):
    """Forwards one product and sum (2), backwards two; AdaLN once per picture; attention of each
    scale over its prefix, but short sequences are trained under a mask, all over all."""
    D, C = 32 * heads, 8
    config = m4.VARConfig(num_classes=5, scales=scales, vocab_size=V, latent_dim=C, depth=depth,
                          width=D, heads=heads, shared_adaln=shared, mlp_ratio=ratio)
    sizes = [side * side for side in scales]
    L = sum(sizes)
    weights = depth * (3 * D * D + D * D + 2 * ratio * D * D) + D * V
    once = (1 if shared else depth) * 6 * D * D + 2 * D * D
    prefix = sum(n * sum(sizes[:k + 1]) for k, n in enumerate(sizes))
    words = (L - sizes[0]) * C * D                         # its input is data: no gradient

    def by_hand(pairs):
        return 6 * (L * weights + once + 2 * pairs * D * depth) + 4 * words
    parameters, flops, use = plan.TransformerWork(m5.Settings(), config, m4.VAR).flops()
    assert flops == pytest.approx(by_hand(L * L if L <= 256 else prefix), rel=0.01)
    assert use == pytest.approx((by_hand(prefix) + 2 * words) / 3, rel=0.01)
    assert parameters == sum(p.numel() for p in m4.VAR(config).parameters())


TOKENIZERS = {
    "shapes": dict(image_size=32, scales=(1, 2, 8), channels=16),
    "levels": dict(image_size=32, scales=(4,), unshuffle=2, multipliers=(1, 2, 3), channels=8,
                   blocks=2)}


@pytest.mark.parametrize("sizes", TOKENIZERS.values(), ids=TOKENIZERS)
def test_a_tokenizers_arithmetic_is_six_products_per_weight_and_pixel(sizes):
    config = m2.TokenizerConfig(**sizes)
    model, products = m2.MultiScaleVQVAE(config), {}

    def look(conv, _, found):
        products[conv] = conv.weight.numel() * found[0, 0].numel()
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(look)
    model.decode(model.encode(torch.zeros(1, 3, config.image_size, config.image_size)))
    by_hand = 6 * sum(products.values()) - 2 * products[model.encoder.conv_in]
    encoder = sum(products[m] for m in [*model.encoder.modules(), model.quant_conv]
                  if m in products)
    parameters, flops, use = plan.TokenizerWork(m5.Settings(), config, m2.MultiScaleVQVAE).flops()
    assert flops == pytest.approx(by_hand, rel=0.01)
    assert use == pytest.approx(2 * encoder, rel=0.01)
    assert parameters == sum(p.numel() for p in model.parameters())


def test_days_follow_from_work_and_gpus(dry, nothing_counted):
    """1e9 x 16 pictures x (2000 + 1600) steps at 1 MFLOP/s, all of it reached: 57,600,000 s."""
    speed = ["--set", "gpu_tflops=0.000001", "mfu=1"]
    rows, days, _ = dry(*speed)
    assert days == pytest.approx(57_600_000 / 86400, rel=0.01)
    assert rows["tokenizer"][-1] == pytest.approx(32_000_000 / 86400, rel=0.01)
    for more, share in ((["--gpus", 2], 1 / 2), (["--gpus", 16], 1 / 16), (["--set", "mfu=0.5"], 2),
                        (["--set", "gpu_tflops=0.000004"], 1 / 4), (["--accumulate", 4], 1),
                        (["--activation-checkpointing"], 1), (["--steps", 2000], 10 / 9)):
        assert dry(*speed, *more)[1] == pytest.approx(days * share, rel=0.01), more


# -- Memory ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("precision, each", [("float32", 16), ("bfloat16", 18), ("auto", 18)])
def test_a_weight_takes_so_many_bytes_and_shards_divide_them(precision, each):
    for shard, processes, share in ((False, 1, 1), (False, 8, 1), (True, 8, 8), (True, 2, 2)):
        work = plan.TransformerWork(m5.Settings(precision=precision, shard=shard), None, None)
        assert work.state_bytes(1000, processes) == 1000 * each / share


def test_memory_per_gpu_counts_its_own_part_of_a_batch(dry, nothing_counted, monkeypatch):
    """Weights of 1 GB, and 0.1 GB that a picture keeps."""
    def gigabytes(*options):
        return dry("--precision", "float32", "--batch-size", 64, *options)[0]["transformer"][-2]
    monkeypatch.setattr(plan.Work, "flops", lambda self: (10 ** 9 // 16, 10 ** 9, 10 ** 8))
    monkeypatch.setattr(plan.TransformerWork, "kept_per_picture", lambda self: 1e8)
    for options, expected in (("", 1 + 6.4), ("--gpus 4", 1 + 1.6), ("--accumulate 4", 1 + 1.6),
                              ("--gpus 2 --accumulate 4 --shard --optimizer adamw", .5 + .8)):
        assert gigabytes(*options.split()) == pytest.approx(expected, abs=0.06)


def kept_for_a_picture(model, loss, precision, small=2, large=4):
    """Bytes that a real forward pass keeps per picture more."""
    sizes = []
    for batch in (small, large):
        kept = {}

        def note(tensor):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
            return tensor
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), \
                torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            value = loss(model, batch)
        sizes.append(sum(storage.nbytes() for storage in kept.values()))
        del value
    return (sizes[1] - sizes[0]) / (large - small)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize("sizes", [
    dict(depth=5, width=192, heads=3, vocab_size=512, scales=(1, 2, 3, 4, 6, 8)),
    dict(depth=4, width=128, heads=4, vocab_size=512, scales=(1, 2, 3, 4, 6, 8)),   # as "shapes"
    dict(depth=3, width=320, heads=5, vocab_size=4096, scales=(1, 2, 3, 4, 5, 6, 8, 11)),
    dict(depth=1, width=64, heads=1, vocab_size=1000, scales=(3, 5), mlp_ratio=2.0)])
def test_what_a_transformer_keeps_is_estimated_within_a_fifth(precision, twice, sizes):
    """The estimate looks at narrow blocks, one and two of them."""
    config = m4.VARConfig(num_classes=5, latent_dim=16, **sizes)
    asked = m5.Settings(precision=precision, activation_checkpointing=twice)
    work, model = plan.TransformerWork(asked, config, m4.VAR), m4.VAR(config).train()
    model.activation_checkpointing = twice
    real = kept_for_a_picture(model, lambda model, batch: work.loss(model, config, batch),
                              precision)
    if twice:                                              # one block is computed again at a time
        block = m4.VAR(config)
        one = kept_for_a_picture(
            block, lambda m, n: m.blocks[0](torch.zeros(n, m.L, config.width, requires_grad=True),
                                            torch.zeros(n, 1, 6, config.width, requires_grad=True)),
            precision)
        real += one
    assert work.kept_per_picture() == pytest.approx(real, rel=0.2)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("sizes", [
    dict(image_size=32, scales=(1, 2, 4), unshuffle=2, multipliers=(1, 2, 2)),
    dict(image_size=128, scales=(1, 2, 4, 8), unshuffle=1, multipliers=(1, 1, 2, 2, 4)),
    dict(image_size=128, scales=(1, 16), unshuffle=4, multipliers=(1, 2), attention=True,
         channels=48)])
def test_what_a_tokenizer_keeps_is_estimated_within_a_fifth(precision, sizes):
    config = m2.TokenizerConfig(**{"channels": 8, **sizes})
    work = plan.TokenizerWork(m5.Settings(precision=precision), config, m2.MultiScaleVQVAE)
    model = m2.MultiScaleVQVAE(config).train()
    for module in model.modules():                         # what autocast does on a GPU
        if isinstance(module, torch.nn.GroupNorm):
            module.register_forward_pre_hook(lambda module, args: (args[0].float(),))
    real = kept_for_a_picture(model, lambda model, batch: work.loss(model, config, batch),
                              precision, 1, 3)
    assert work.kept_per_picture() == pytest.approx(real, rel=0.2)


# -- Sizes that are unusual ------------------------------------------------------------------------

@pytest.mark.parametrize("options", [
    "--image-size 4 --set scales=1", "--image-size 16 --set scales=4 residual=false", "--depth 1",
    "--image-size 32 --set scales=8 width=30 heads=3", "--quantizer lfq --set latent_dim=9",
    "--set learn=gradient shared_adaln=true qk_norm=false", "--precision float32 --steps 0",
    "--image-size 144 --set scales=1,9,18 multipliers=1,2 channels=8",
    "--image-size 128 --set scales=1,9,32 multipliers=1 channels=8",
    "--image-size 16 --set scales=4 --perceptual 1 --adversarial 1"])
def test_unusual_sizes_have_a_plan_too(dry, options):
    rows, _, _ = dry("--batch-size", 2, *options.split())
    assert set(rows) == {"tokenizer", "transformer"} and all(row[4] > 0 for row in rows.values())


# -- Kernels ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["tokenizer", "transformer"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_about_as_many_kernels_are_planned_as_a_training_step_asks_for(kind, accumulate):
    from test_nothing_lost import stage_of
    run, stage = stage_of(kind, learn="ema", accumulate=accumulate)
    work, model = {"tokenizer": (plan.TokenizerWork, m2.MultiScaleVQVAE),
                   "transformer": (plan.TransformerWork, m4.VAR)}[kind]
    planned = work(run.settings, stage.model.config, model).kernels()
    batches = stage.batches(0)
    m5.take_step(run, stage, stage.model, next(batches), 0.5)
    with plan.Kernels() as counter:
        m5.take_step(run, stage, stage.model, next(batches), 0.5)
    assert 0.7 < planned / counter.count < 1.4


def test_kernels_are_operations_that_compute():
    with plan.Kernels() as counter:
        x = torch.empty(2, 3).fill_(1.0)
        (x.t()[0].view(2, 1).expand(2, 5) + 1).sum()
    assert counter.count == 3, "to fill, to add, to sum; not to make room, turn, choose or repeat"


def test_a_small_model_waits_for_its_kernels_and_a_large_one_for_its_arithmetic(dry, monkeypatch):
    monkeypatch.setattr(plan.Work, "kernels", lambda self: 1000)
    monkeypatch.setattr(plan.Work, "kept", lambda self, config, **flags: 10 ** 6)
    for flops, seconds in ((1.0, 0.01), (989e12 / 16, 2.5)):         # of a step of 16 pictures
        monkeypatch.setattr(plan.Work, "flops", lambda self: (10 ** 6, flops, 1.0))
        rows, _, out = dry("--steps", 600_000, "--batch-size", 16)
        assert rows["transformer"][-1] == pytest.approx(600_000 * seconds / 86400, rel=0.02)
        assert "10 us each" in out
