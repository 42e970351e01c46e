"""How fast is it, and how much memory does it take? Nothing is trained for real.

    python experiments/benchmark.py                            the built-in shapes
    python experiments/benchmark.py --size d16 --batch-size 4
    python experiments/benchmark.py --size d30 --batch-size 64 --device cuda

Models have the sizes of a preset of chapter 5, or those of the paper for 256 pixels.
Weights and images are random. The tokenizer's training step leaves out the perceptual and
the adversarial loss. On a CPU, memory is the peak of the whole process so far.
"""
import resource
import sys
import time
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from engine.device import autocast, best_precision, pick_device
from engine.optimizers import make_optimizers, take_step
from experiments.trial import (drawing, number, parameters, quick_parser, run_main, show,
                               training, transformer, vqvae)

SIZES = {"shapes": "--dataset shapes", "cifar10": "--dataset cifar10",
         "d16": "--dataset imagenet --depth 16", "d30": "--dataset imagenet --depth 30"}


def measure(work, device, repeats):
    """-> the fastest of some repeats in seconds, peak memory in GB"""
    on_gpu, times = device.type == "cuda", []
    work()                                                 # the first one is slow
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    for _ in range(repeats):
        begin = time.perf_counter()
        work()
        if on_gpu:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    if on_gpu:
        return min(times), torch.cuda.max_memory_allocated() / 1e9
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return min(times), peak / (1e9 if sys.platform == "darwin" else 1e6)


def main():
    parser = quick_parser(__doc__)
    add = parser.add_argument
    add("--size", choices=SIZES, default="shapes", help="sizes of both models [shapes]")
    add("--batch-size", type=number(int, 1), default=16, help="images [16]")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"))
    args = parser.parse_args()
    batch = 2 if args.quick else args.batch_size
    settings = training.read_settings(SIZES[args.size].split())
    device = pick_device(args.device)
    timed = partial(measure, device=device, repeats=1 if args.quick else 5)
    config, precision = training.tokenizer_config(settings), best_precision(device)
    compute = partial(autocast, device, precision)

    torch.manual_seed(0)
    tokenizer = vqvae.MultiScaleVQVAE(config).to(device)
    var = transformer.VAR(training.var_config(settings, config, 1000)).to(device)
    side = config.image_size
    image = 2 * torch.rand(batch, 3, side, side, device=device) - 1
    labels = torch.arange(batch, device=device) % 1000
    with torch.no_grad():
        maps = tokenizer.eval().image_to_tokens(image)                 # K maps (B, n)

    def training_step(model):
        optimizers = make_optimizers(model, 1e-4, 0.05, settings.optimizer, precision)
        model.train()

        def step():
            with compute():
                if model is tokenizer:
                    parts = tokenizer(image)[2]
                    loss = parts["reconstruction"] + 0.25 * (parts["vq"] + parts["extra"])
                else:
                    tokens = torch.cat(maps, 1)
                    loss = training.token_losses(var, tokenizer, tokens, labels)[0].mean()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
            take_step(optimizers, norm, 0)
        return step

    rows = {}
    for name, model in (("tokenizer", tokenizer), ("transformer", var)):
        rows[f"training step, {name}"] = timed(training_step(model))
        model.eval()
    with torch.no_grad():
        with compute():
            rows["tokenise"] = timed(lambda: tokenizer.image_to_tokens(image))
        drawing.set_precision(var, "auto", device)         # of decoding, too
        rows["decode"] = timed(lambda: drawing.to_image(tokenizer, var, maps))
        rows["sample, guided"] = timed(lambda: drawing.generate(
            tokenizer, var, labels, cfg=1.5, top_k=900, top_p=0.96))

    machine = f"CPU with {torch.get_num_threads()} thread(s)"
    if device.type == "cuda":
        machine = torch.cuda.get_device_name()
    sizes = f"{parameters(tokenizer):.1f} and {parameters(var):.1f} M parameters"
    print(f"{args.size}, {sizes}, {precision}, torch {torch.__version__}, {machine}")
    show([f"batch {batch}", "ms", "images/s", "peak memory, GB"],
         [[name, f"{1000 * seconds:.1f}", f"{batch / seconds:.1f}", f"{peak:.1f}"]
          for name, (seconds, peak) in rows.items()])


if __name__ == "__main__":
    run_main(main)
