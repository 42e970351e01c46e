"""How fast is it? Prints the README's tables; nothing is asserted, nothing is trained for real.

    python experiments/benchmark.py                    on a CPU, about 10 minutes
    python experiments/benchmark.py --device cuda  depth 16 and 30, attention kernels, torch.compile

On a CPU: the work of the original code's sizes (256 px, its tokenizer of 109 M parameters, a
transformer of depth 8, 4 pictures, float32), in seconds and in units of U, the time of one float32
product of two 2048x2048 matrices in the same process. Beside it the same models as the original
code runs them: convolutions in torch's default memory layout, attention under a dense mask, every
picture encoded again in every training step. Then training steps per second at small sizes.
"""
import argparse
import contextlib
import copy
import platform
import resource
import sys
import tempfile
import time
from importlib import import_module
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from data import shapes  # noqa: E402
from engine import plan, released  # noqa: E402
from data.batches import to_float  # noqa: E402
from engine.devices import choose_precision, fast_bfloat16, lay_out  # noqa: E402
from engine.processes import Processes  # noqa: E402
from engine.run_folder import RunFolder  # noqa: E402

vqvae, mask = import_module("02_multiscale_vqvae"), import_module("03_block_causal_mask")
transformer, training = import_module("04_var_transformer"), import_module("05_train")
sampling = import_module("06_sample_and_edit")

SCALES, PICTURE = released.SCALES[680], 256
PEAK = {"H100": 989, "H200": 989, "A100": 312, "L40S": 362, "4090": 165}    # bfloat16, TFLOP/s
# In U, when U was 0.10 s: measured on 2 cores, in float32, by those who maintain this project.
ORIGINAL = {"tokenise": 66, "decode": 104, "sample": 137, "training step": 102}


def seconds(work, device, repeats):
    """The fastest of some repeats, after one that does not count."""
    times = []
    for _ in range(repeats + 1):
        synchronise(device)
        begin = time.perf_counter()
        work()
        synchronise(device)
        times.append(time.perf_counter() - begin)
    return min(times[1:])


def synchronise(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def var_config(depth):
    return transformer.VARConfig(num_classes=1000, scales=SCALES, vocab_size=4096, latent_dim=32,
                                 depth=depth)


def stage_of(options, tokenizer_config, config, batch, folder):
    """Stage 2 as chapter 5 builds it, on invented tokens, whose last batch is ready to be used."""
    settings, *_ = training.read_settings([*options, "--out", folder])
    processes = Processes(settings.device)
    if settings.precision == "auto":
        settings.precision = choose_precision(processes)
    tokenizer = lay_out(vqvae.MultiScaleVQVAE(tokenizer_config), processes.device)
    tokenizer.eval().requires_grad_(False)
    L = sum(side * side for side in config.scales)
    tokens = torch.randint(config.vocab_size, (1, batch, L)).numpy().astype("uint16")
    labels = torch.randint(config.num_classes, (batch,)).numpy()
    data = {"train": (tokens, labels), "test": (tokens, labels)}
    return training.TransformerStage(settings, processes, tokenizer, config, data,
                                     [""] * config.num_classes)


def original_sizes(device, repeats):
    """The four pieces of work, every way in turn, again and again: other programs disturb all ways
    alike, and the fastest of each counts. -> {name: {how: seconds}}, seconds of U, peak GB of ours
    """
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        options = "--dataset imagenet --precision float32 --batch-size 4 --device", device.type
        stage = stage_of(" ".join(options).split(), vqvae.TokenizerConfig(**released.TOKENIZER),
                         var_config(8), 4, folder)
    image, labels = torch.rand(4, 3, PICTURE, PICTURE, device=device) * 2 - 1, torch.arange(4)
    batch, a = stage.rows("train", torch.arange(4).numpy()), torch.randn(2048, 2048, device=device)
    tokens = stage.tokenizer.image_to_tokens(image)

    def train(tokenizer, how):
        if how == "plain":
            tokenizer.image_to_tokens(image)
        with torch.enable_grad():
            training.train_step(stage, stage.model.train(), batch, 0.5)
    work = {"tokenise": lambda tokenizer, how: tokenizer.image_to_tokens(image),
            "decode": lambda tokenizer, how: tokenizer.tokens_to_image(tokens),
            "sample": lambda tokenizer, how: sampling.generate(
                tokenizer, stage.model.eval(), labels, cfg=1.5, top_k=900, top_p=0.96),
            "training step": train}
    ways = {"float32": stage.tokenizer}
    if fast_bfloat16(device):
        ways["bfloat16"] = stage.tokenizer
    with torch.no_grad():
        for piece in work.values():                        # as a user's program would, so far
            piece(stage.tokenizer, "float32")
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (
            1e9 if sys.platform == "darwin" else 1e6)
        ways["plain"] = copy.deepcopy(stage.tokenizer).to(memory_format=torch.contiguous_format)
        found = {name: {how: [] for how in ways} for name in work}
        U = [seconds(lambda: a @ a, device, 5)]
        for turn in range(repeats + 1):
            for name, piece in work.items():
                for how, tokenizer in ways.items():
                    with way_of(how):
                        begin = time.perf_counter()
                        piece(tokenizer, how)
                        found[name][how].append(time.perf_counter() - begin)
                U.append(seconds(lambda: a @ a, device, 2))
    best = {name: {how: min(times[1:]) for how, times in hows.items()}
            for name, hows in found.items()}
    return best, min(U), memory


@contextlib.contextmanager
def way_of(how):
    """bfloat16 by autocast; the plain way computes all products of attention and hides some."""
    prefix = mask.block_causal_attention
    if how == "plain":
        mask.block_causal_attention = hide_afterwards
    try:
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "bfloat16"):
            yield
    finally:
        mask.block_causal_attention = prefix


def hide_afterwards(q, k, v, scales, allowed=None, qk_factor=None):
    allowed = mask.block_causal_mask(scales).to(q.device) if allowed is None else allowed
    return mask.attention(q, k, v, allowed, qk_factor)


def print_original_sizes(found, U, memory):
    ways = [how for how in ("float32", "bfloat16") if how in found["sample"]]
    print("| 4 pictures of 256 px | original, U | plain, U |"
          + "".join(f" {how}, U | seconds | plain / {how} |" for how in ways))
    print("| --- " * (3 + 3 * len(ways)) + "|")
    for name, times in found.items():
        print(f"| {name} | {ORIGINAL[name]} | {times['plain'] / U:.0f} |" + "".join(
            f" {times[how] / U:.0f} | {times[how]:.2f} | {times['plain'] / times[how]:.2f}x |"
            for how in ways))
    print(f"U = {U:.3f} s; largest peak memory of ours {memory:.1f} GB")


@torch.no_grad()
def half_precision(count=500):
    """What bfloat16 changes in the shipped tokenizer's work."""
    tokenizer, _ = training.load_tokenizer(ROOT / "data/pretrained/shapes.pt")
    image = to_float(torch.from_numpy(shapes.load("test", count=count)[0]))
    exact = tokenizer.image_to_tokens(image)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = tokenizer.image_to_tokens(image)
    f_hat = tokenizer.features(exact)
    pictures = [tokenizer.tokens_to_image(tokens) for tokens in (exact, rounded)]
    halved = copy.deepcopy(tokenizer).bfloat16().decode(f_hat).float().clamp(-1, 1)

    def psnr(a, b):
        return float(10 * torch.log10(4 / (a - b).square().mean()))
    same = float((torch.cat(exact, 1) == torch.cat(rounded, 1)).float().mean())
    print(f"\nbfloat16 on {count} shapes: {same:.1%} of the tokens stay, PSNR of reconstructions "
          f"{psnr(pictures[0], image):.2f} -> {psnr(pictures[1], image):.2f} dB; decoded in it: "
          f"{psnr(pictures[0], halved):.1f} dB from float32")


def small_sizes(device, repeats):
    """Training steps per second of both stages at the presets for shapes and CIFAR-10; on a GPU
    with torch.compile too: does it pay within ten minutes of training?"""
    print("\n| preset | stage | batch | parameters | precision | compile | ms a step | "
          "pictures/s |\n" + "| --- " * 8 + "|")
    for name in ("shapes", "cifar10"):
        options = ["--dataset", name, "--device", device.type]
        settings, config, var_fields = training.read_settings(options)
        with tempfile.TemporaryDirectory() as folder:
            processes = Processes(settings.device)
            settings.precision = choose_precision(processes)
            images = torch.randint(256, (settings.tokenizer_batch_size, 32, 32, 3)).byte().numpy()
            first = training.TokenizerStage(settings, processes, RunFolder(folder), config, images,
                                            images[:1], [""] * 10)
            pixels = (torch.from_numpy(images),)
            sizes = training.var_sizes(var_fields, config, 10)
            second = stage_of(options, config, sizes, settings.batch_size, folder)
            rows = second.rows("train", torch.arange(settings.batch_size).numpy())
            for stage, batch in ((first, pixels), (second, rows)):
                parameters = sum(p.numel() for p in stage.model.parameters()) / 1e6
                for how in ("off", "on")[:1 + (device.type == "cuda")]:
                    model = stage.processes.wrap(stage.model.train(), compile=how == "on")
                    time_ = seconds(lambda: training.train_step(stage, model, batch, 0.5), device,
                                    repeats)
                    print(f"| {name} | {stage.name} | {stage.batch_size} | {parameters:.1f} M | "
                          f"{stage.settings.precision} | {how} | {1e3 * time_:.0f} | "
                          f"{stage.batch_size / time_:.0f} |", flush=True)


def gpu(device, depths=(16, 30), batch=64, repeats=5):
    """Training steps and sampling at full size, then attention kernels."""
    print("\n| depth | batch | compile | ms a step | pictures/s | MFU | peak GB | sampled/s |\n"
          + "| --- " * 8 + "|")
    for depth in depths:
        for compiled in (False, True)[:1 + (device.type == "cuda")]:
            full_size(device, depth, batch, repeats, compiled)
    kernels(device, batch, repeats)


def full_size(device, depth, batch, repeats, compiled):
    """One row: training steps in bfloat16, then sampling with cfg 1.5, if the model fits."""
    options = (f"--dataset imagenet --depth {depth} --device {device.type} --precision bfloat16 "
               f"--batch-size {batch}".split() + (["--compile"] if compiled else []))
    cuda = device.type == "cuda"
    name = torch.cuda.get_device_name() if cuda else "CPU"
    peak = next((value for key, value in PEAK.items() if key in name), None)
    config, sizes = vqvae.TokenizerConfig(**released.TOKENIZER), var_config(depth)
    with torch.device("meta"):
        model = transformer.VAR(sizes)
    flops = plan.flops(lambda: model(torch.zeros(1, dtype=torch.long), torch.zeros(
        1, model.L - model.first, sizes.latent_dim)))
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    try:
        with tempfile.TemporaryDirectory() as folder:
            stage = stage_of(options, config, sizes, batch, folder)
        wrapped = stage.processes.wrap(stage.model.train(), stage.settings.compile)
        rows = stage.rows("train", torch.arange(batch).numpy())
        step = seconds(lambda: training.train_step(stage, wrapped, rows, 0.5), device,
                       repeats)
        memory = torch.cuda.max_memory_allocated() / 1e9 if cuda else 0
        labels = torch.arange(batch, device=device)
        with torch.autocast(device.type, torch.bfloat16), torch.no_grad():
            drawn = seconds(lambda: sampling.generate(
                stage.tokenizer, stage.model.eval(), labels, cfg=1.5, top_k=900, top_p=0.96),
                device, 1)
    except torch.OutOfMemoryError:
        return print(f"| {depth} | {batch} | {'on' if compiled else 'off'} | out of memory |")
    mfu = f"{flops * batch / step / peak / 1e12:.1%}" if peak else "-"
    print(f"| {depth} | {batch} | {'on' if compiled else 'off'} | {1e3 * step:.0f} | "
          f"{batch / step:.0f} | {mfu} | {memory:.1f} | {batch / drawn:.1f} |", flush=True)


def kernels(device, batch, repeats, scales=SCALES, heads=16):
    """Block-causal attention by every way there is, forwards and backwards."""
    L = sum(side * side for side in scales)
    q, k, v = torch.randn(3, batch, heads, L, 64, device=device, dtype=torch.bfloat16)
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    allowed = mask.block_causal_mask(scales).to(device)
    ways = {"prefix": lambda: mask.block_causal_attention(q, k, v, scales, allowed),
            "SDPA, dense mask": lambda: mask.attention(q, k, v, allowed)}
    if device.type == "cuda":
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention
        scale = mask.scale_of_token(scales).to(device)
        blocks = create_block_mask(lambda b, h, i, j: scale[i] >= scale[j], None, None, L, L,
                                   device=str(device))
        flex = torch.compile(flex_attention)
        ways["FlexAttention, compiled"] = lambda: flex(q, k, v, block_mask=blocks)
        ways["prefix, compiled"] = torch.compile(ways["prefix"])
    print(f"\n| attention, {batch} x {heads} x {L} x 64, bfloat16 | forward ms | both ms |\n"
          "| --- | --- | --- |")
    for name, way in ways.items():
        try:
            with torch.no_grad():
                forward = seconds(way, device, repeats)
            both = seconds(lambda: way().sum().backward(), device, repeats)
        except RuntimeError as error:                      # too large, or no such kernel here
            print(f"| {name} | {str(error).splitlines()[0][:60]} | |")
            continue
        print(f"| {name} | {1e3 * forward:.2f} | {1e3 * both:.2f} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--repeats", type=int, default=3, help="the fastest counts [3]")
    args = parser.parse_args()
    device = torch.device(args.device)
    where = torch.cuda.get_device_name() if device.type == "cuda" else (
        f"{torch.get_num_threads()} threads, {platform.processor() or platform.machine()}")
    print(f"torch {torch.__version__}, {where}, {time.strftime('%Y-%m-%d')}")
    if device.type == "cuda":
        gpu(device)
    else:
        print_original_sizes(*original_sizes(device, args.repeats))
        half_precision()
    small_sizes(device, args.repeats)


if __name__ == "__main__":
    main()
