"""How fast is it, and how much memory does it take? Nothing is trained for real.

    python experiments/benchmark.py                            the built-in shapes
    python experiments/benchmark.py --size d30 --batch-size 64 --device cuda

Weights and images are random. The tokenizer's training step leaves out the perceptual and
the adversarial loss. On a CPU (under Linux), memory is the peak of the whole process.
"""
import resource
import sys
from functools import partial
from pathlib import Path

import torch
from torch.utils.benchmark import Timer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from engine.device import autocast, best_precision, pick_device
from engine.optimizers import make_optimizers, take_step
from experiments.trial import (drawing, number, parameters, quick_parser, run_main, show,
                               training, transformer, vqvae)

SIZES = {"shapes": "--dataset shapes", "cifar10": "--dataset cifar10",
         "d16": "--dataset imagenet --depth 16", "d30": "--dataset imagenet --depth 30"}


def measure(work, device, repeats):
    """-> the mean time in seconds, peak memory in GB"""
    timer = Timer("work()", globals=dict(work=work), num_threads=torch.get_num_threads())
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return timer.timeit(repeats).mean, torch.cuda.max_memory_allocated() / 1e9
    seconds = timer.timeit(repeats).mean
    return seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def main():
    parser = quick_parser(__doc__)
    parser.add_argument("--size", choices=SIZES, default="shapes", help="[shapes]")
    parser.add_argument("--batch-size", type=number(int, 1), default=16, help="images [16]")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
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
    image = torch.rand(batch, 3, config.image_size, config.image_size, device=device)
    labels = torch.arange(batch, device=device) % 1000
    with torch.no_grad():
        maps = tokenizer.eval().image_to_tokens(image)                 # K maps (B, n)
    tokens = torch.cat(maps, 1)                                        # (B, L)

    def training_step(model):
        optimizers = make_optimizers(model, 1e-4, 0.05, settings.optimizer, precision)
        model.train()

        def step():
            with compute():
                if model is tokenizer:
                    parts = tokenizer(image)[2]
                    loss = parts["reconstruction"] + 0.25 * parts["vq"] + parts["extra"]
                else:
                    loss = training.token_losses(var, tokenizer, tokens, labels)[0].mean()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
            take_step(optimizers, norm, 0)
        return step

    rows = {"training step, tokenizer": timed(training_step(tokenizer)),
            "training step, transformer": timed(training_step(var))}
    tokenizer.eval()
    var.eval()
    with torch.no_grad():
        with compute():
            rows["tokenise"] = timed(lambda: tokenizer.image_to_tokens(image))
        drawing.set_precision(var, "auto", device)         # of decoding, too
        rows["decode"] = timed(lambda: drawing.to_image(tokenizer, var, maps))
        rows["sample, guided"] = timed(lambda: drawing.generate(
            tokenizer, var, labels, cfg=1.5, top_k=900, top_p=0.96))

    print(f"{args.size}, {parameters(tokenizer):.1f} and {parameters(var):.1f} M weights, "
          f"{precision} on {device.type}, torch {torch.__version__}, "
          f"{torch.get_num_threads()} thread(s)")
    show([f"batch {batch}", "ms", "images/s", "peak memory, GB"],
         [[name, f"{1000 * seconds:.1f}", f"{batch / seconds:.1f}", f"{peak:.1f}"]
          for name, (seconds, peak) in rows.items()])


if __name__ == "__main__":
    run_main(main)
