"""How fast is it? Prints the tables of experiments/README.md. Nothing is trained for real.

    python experiments/benchmark.py                on a CPU, about 10 minutes
    python experiments/benchmark.py --device cuda  attention, depths 16 and 30, torch.compile

On a CPU: the original code's sizes (256 px, its tokenizer of 109 M parameters, a transformer of
depth 8, 4 images), in seconds and in units of U, the time of one float32 product of two 2048x2048
matrices in the same process. "plain" is the same models as the original code runs them: attention
under a dense mask, convolutions in torch's default memory layout, every image encoded again in
every training step. Then training steps at the sizes of the presets.
"""
import argparse
import copy
import platform
import resource
import sys
import time
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from unittest import mock

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from data import shapes  # noqa: E402
from data.batches import to_float  # noqa: E402
from engine import released  # noqa: E402
from engine.devices import choose_precision, fast_bfloat16, lay_out  # noqa: E402
from engine.processes import Processes  # noqa: E402
from report.health import decibels  # noqa: E402

vqvae, masking = import_module("02_multiscale_vqvae"), import_module("03_block_causal_mask")
transformer, training = import_module("04_var_transformer"), import_module("05_train")
sampling = import_module("06_sample_and_edit")

TOKENIZER = vqvae.TokenizerConfig(**released.TOKENIZER)
GUIDED = dict(cfg=1.5, top_k=900, top_p=0.96)
# In U, when U was 0.10 s: the original code on 2 cores in float32, measured when this was written.
ORIGINAL = {"tokenise": 66, "decode": 104, "sample": 137, "training step": 102}


def seconds(work, repeats):
    """The fastest of some repeats, after one that does not count."""
    times = []
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return min(times[1:])


def var_config(depth):
    return transformer.VARConfig(num_classes=1000, scales=TOKENIZER.scales, latent_dim=32,
                                 vocab_size=TOKENIZER.vocab_size, depth=depth)


def row(*cells):
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def head(*cells):
    print()
    row(*cells)
    row(*["---"] * len(cells))


def stage_2(options, tokenizer_config, config, batch):
    """Stage 2 as chapter 5 builds it, on invented tokens. -> stage, a batch"""
    settings = training.read_settings(options.split())[0]
    processes = Processes(settings.device)
    if settings.precision == "auto":
        settings.precision = choose_precision(processes)
    tokenizer = lay_out(vqvae.MultiScaleVQVAE(tokenizer_config).eval().requires_grad_(False),
                        processes.device, settings.precision)
    L = sum(side * side for side in config.scales)
    data = (torch.randint(config.vocab_size, (1, batch, L)).numpy().astype("uint16"),
            torch.randint(config.num_classes, (batch,)).numpy())
    stage = training.TransformerStage(settings, processes, tokenizer, config,
                                      dict(train=data, test=data), [""] * config.num_classes)
    return stage, stage.rows("train", torch.arange(batch).numpy())


def original_sizes(device, repeats):
    """Every piece of work in every way in turn, again and again: other programs disturb all ways
    alike, and the fastest turn of each counts."""
    torch.manual_seed(0)
    stage, batch = stage_2(f"--dataset imagenet --precision float32 --device {device}", TOKENIZER,
                           var_config(8), 4)
    side, a = TOKENIZER.image_size, torch.randn(2048, 2048, device=device)
    image = torch.rand(4, 3, side, side, device=device) * 2 - 1
    labels, tokens = torch.arange(4, device=device), stage.tokenizer.image_to_tokens(image)
    plain = copy.deepcopy(stage.tokenizer).to(memory_format=torch.contiguous_format)
    tokenizers = {"plain": plain, "float32": stage.tokenizer}
    if fast_bfloat16(torch.device(device)):
        tokenizers["bfloat16"] = plain                     # the better layout there

    def under_mask(q, k, v, scales, mask, qk_factor):
        return masking.attention(q, k, v, mask, qk_factor)

    def step(way):
        if way == "plain":
            tokenizers[way].image_to_tokens(image)
        with torch.enable_grad():
            training.train_step(stage, stage.model.train(), batch, 0.5)
    work = {"tokenise": lambda way: tokenizers[way].image_to_tokens(image),
            "decode": lambda way: tokenizers[way].tokens_to_image(tokens),
            "sample": lambda way: sampling.generate(tokenizers[way], stage.model.eval(), labels,
                                                    **GUIDED),
            "training step": step}
    contexts = {"float32": nullcontext, "bfloat16": lambda: torch.autocast(device, torch.bfloat16),
                "plain": lambda: mock.patch.object(masking, "block_causal_attention", under_mask)}
    found, unit = {}, [seconds(lambda: a @ a, 5)]
    with torch.no_grad():
        for _ in range(repeats):
            for name, piece in work.items():
                for way in tokenizers:
                    with contexts[way]():
                        found.setdefault((name, way), []).append(seconds(lambda: piece(way), 1))
                unit.append(seconds(lambda: a @ a, 2))
    U, ways = min(unit), [way for way in tokenizers if way != "plain"]
    head("4 images of 256 px", "original, U", "plain, U",
         *[f"{way}{unit}" for way in ways for unit in (", U", ", s", ", times plain")])
    for name in work:
        best = {way: min(found[name, way]) for way in tokenizers}
        row(name, ORIGINAL[name], f"{best['plain'] / U:.0f}", *[text for way in ways for text in (
            f"{best[way] / U:.0f}", f"{best[way]:.2f}", f"{best['plain'] / best[way]:.2f}x")])
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    memory /= 1e9 if sys.platform == "darwin" else 1e6
    print(f"U = {U:.3f} s; peak memory of all ways {memory:.1f} GB")


@torch.no_grad()
def half_precision(count=500):
    """What bfloat16 changes in the shipped tokenizer's work."""
    tokenizer, _ = training.load_tokenizer(ROOT / "data/pretrained/shapes.pt")
    image = to_float(torch.from_numpy(shapes.load("test", count=count)[0]))
    exact = tokenizer.image_to_tokens(image)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = tokenizer.image_to_tokens(image)
    images = [tokenizer.tokens_to_image(tokens) for tokens in (exact, rounded)]
    half = copy.deepcopy(tokenizer).bfloat16().decode(tokenizer.features(exact)).float()

    def psnr(a, b):
        return float(decibels((a - b).square().mean()))
    same = float((torch.cat(exact, 1) == torch.cat(rounded, 1)).float().mean())
    print(f"\nbfloat16 on {count} shapes: {same:.1%} of the tokens are the same, PSNR of the "
          f"reconstructions {psnr(images[0], image):.2f} -> {psnr(images[1], image):.2f} dB; "
          f"decoded in it: {psnr(images[0], half.clamp(-1, 1)):.1f} dB from float32")


def steps(device, repeats, presets=("shapes", "cifar10")):
    """Training steps at the sizes of presets; on a GPU also of ImageNet, and with torch.compile."""
    head("preset", "stage", "batch", "parameters", "precision", "compile", "ms a step", "images/s")
    large = [f"imagenet --batch-size 64 --depth {depth}" for depth in (16, 30)]
    for preset in (*presets, *(large if device == "cuda" else ())):
        options = f"--dataset {preset} --device {device}"
        settings, config, var_config = training.read_settings(options.split())
        stage, tokens = stage_2(options, config, training.var_sizes(var_config, config, 10),
                                settings.batch_size)
        work = [(stage, tokens)]
        if config.image_size == 32:
            images = torch.randint(256, (settings.tokenizer_batch_size, 32, 32, 3)).byte()
            work.append((training.TokenizerStage(
                stage.settings, stage.processes, None, config, images.numpy(), images[:1].numpy(),
                [""] * 10), (images,)))
        for stage, batch in work:
            parameters = sum(p.numel() for p in stage.model.parameters()) / 1e6
            for compiled in (False, True)[:1 + (device == "cuda")]:
                model = stage.processes.wrap(stage.model.train(), compiled)
                took = seconds(lambda: training.train_step(stage, model, batch, 0.5), repeats)
                row(preset, stage.name, stage.batch_size, f"{parameters:.1f} M",
                    stage.settings.precision, "on" if compiled else "off", f"{1e3 * took:.0f}",
                    f"{stage.batch_size / took:.0f}")


def kernels(device, batch=64, repeats=5, heads=16):
    """Block-causal attention in several ways, forward and backward, in bfloat16."""
    scales = TOKENIZER.scales
    allowed = masking.block_causal_mask(scales).to(device)
    L = len(allowed)
    q, k, v = (torch.randn(batch, heads, L, 64, device=device, dtype=torch.bfloat16,
                           requires_grad=True) for _ in range(3))
    ways = {"by prefixes": lambda: masking.block_causal_attention(q, k, v, scales, allowed),
            "dense mask": lambda: masking.attention(q, k, v, allowed)}
    if device == "cuda":
        ways.update({f"{name}, compiled": torch.compile(way) for name, way in ways.items()})
    head(f"attention, {batch} x {heads} x {L} x 64, bfloat16", "forward, ms", "both, ms")
    for name, way in ways.items():
        try:
            with torch.no_grad():
                forward = seconds(way, repeats)
            row(name, f"{1e3 * forward:.2f}",
                f"{1e3 * seconds(lambda: way().sum().backward(), repeats):.2f}")
        except RuntimeError as error:                      # too large, or no such kernel here
            row(name, str(error).splitlines()[0][:60], "")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--repeats", type=int, default=3, help="the fastest counts [3]")
    args = parser.parse_args()
    machine = torch.cuda.get_device_name() if args.device == "cuda" else (
        f"{torch.get_num_threads()} threads, {platform.processor() or platform.machine()}")
    print(f"torch {torch.__version__}, {machine}, {time.strftime('%Y-%m-%d')}")
    if args.device == "cuda":
        kernels("cuda")
    else:
        original_sizes("cpu", args.repeats)
        half_precision()
    steps(args.device, args.repeats)


if __name__ == "__main__":
    main()
