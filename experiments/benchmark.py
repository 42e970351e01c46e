"""How fast is it, and how much memory does a GPU need? Nothing is trained for real.

    python experiments/benchmark.py                            the built-in shapes
    python experiments/benchmark.py --size d30 --batch-size 64 --device cuda

Weights and images are random. The tokenizer's training step leaves out the perceptual and
the adversarial loss. On a CPU, memory is not measured (0).
"""
import torch
from torch.utils.benchmark import Timer

from trial import (drawing, number, parameters, quick_parser, run_main, show, training,
                   transformer, vqvae)
from engine.device import autocast, best_precision, pick_device
from engine.optimizers import make_optimizers, take_step

SIZES = {"shapes": "--dataset shapes", "cifar10": "--dataset cifar10",
         "d16": "--dataset imagenet --depth 16", "d30": "--dataset imagenet --depth 30"}


def main():
    parser = quick_parser(__doc__)
    parser.add_argument("--size", choices=SIZES, default="shapes", help="[shapes]")
    parser.add_argument("--batch-size", type=number(int, 1), default=16, help="images [16]")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    args = parser.parse_args()
    batch, repeats = (2, 1) if args.quick else (args.batch_size, 5)
    settings = training.read_settings(SIZES[args.size].split())
    device = pick_device(args.device)
    config = training.config_of(vqvae.TokenizerConfig, settings)
    precision = best_precision(device)
    torch.manual_seed(0)
    tokenizer = vqvae.MultiScaleVQVAE(config).to(device)
    var = transformer.VAR(training.config_of(transformer.VARConfig, config, settings,
                                             num_classes=1000)).to(device)
    image = torch.rand(batch, 3, config.image_size, config.image_size, device=device)
    labels, lines = torch.arange(batch, device=device) % 1000, []

    def measure(name, work):
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        seconds = Timer("work()", globals=dict(work=work),
                        num_threads=torch.get_num_threads()).timeit(repeats).mean
        peak = torch.cuda.max_memory_allocated() / 1e9
        lines.append([name, f"{1000 * seconds:.1f}", f"{batch / seconds:.1f}",
                      f"{peak:.1f}"])

    def train(name, model, loss_of):
        optimizers = make_optimizers(model, 1e-4, 0.05, settings.optimizer, precision)

        def step():
            with autocast(device, precision):
                loss = loss_of()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
            take_step(optimizers, norm, 0)
        measure(f"training step, {name}", step)
        model.eval()

    train("tokenizer", tokenizer, lambda: sum(tokenizer(image)[2].values()))
    with torch.no_grad(), autocast(device, precision):
        maps = tokenizer.image_to_tokens(image)                        # K maps (B, n)
        measure("tokenise", lambda: tokenizer.image_to_tokens(image))
    train("transformer", var, lambda: training.token_losses(
        var, tokenizer, torch.cat(maps, 1), labels)[0].mean())
    drawing.set_precision(var, "auto", device)             # of decoding, too
    with torch.no_grad():
        measure("decode", lambda: drawing.to_image(tokenizer, var, maps))
        measure("sample, guided", lambda: drawing.generate(
            tokenizer, var, labels, cfg=1.5, top_k=900, top_p=0.96))
    print(f"{args.size}, {parameters(tokenizer):.1f} and {parameters(var):.1f} M weights, "
          f"{precision} on {device.type}, torch {torch.__version__}, "
          f"{torch.get_num_threads()} thread(s)")
    show([f"batch {batch}", "ms", "images/s", "GPU memory, GB"], lines)


if __name__ == "__main__":
    run_main(main)
