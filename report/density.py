"""The other half of a generative model: how probable is an image?

The tokens of an image have an exact probability under the transformer (log_likelihood in
chapter 6), which gives

    a measure      -log2 p: bits per token, per scale, per pixel
    a classifier   p(class | tokens) = p(tokens | class) / the same summed over the classes:
                   Bayes' rule, if all classes are equally common

Many images share the same tokens, so these are probabilities of token maps, not of pixels:
do not compare them with the bits per dimension of models of pixels.

Shapes: nats (N, K), ln p of the tokens of each scale.
"""
import math

import torch

from data.batches import per_pass
from engine.progress import progress


@torch.no_grad()
def density(tokenizer, log_likelihood, image, labels, classes, no_class):
    """Print bits per scale of images (N, 3, H, W) in [-1, 1], and judge their class.

    log_likelihood(tokens, labels (B,)) -> nats (B, K); classes: {number: name} of those to
    compare; labels (N,): the number of each image, None if unknown (then N = 1)"""
    device, numbers = next(tokenizer.parameters()).device, torch.tensor(list(classes))
    parts = []
    for part in progress(image.split(min(100, per_pass(image.shape[-1]))), len(image)):
        tokens = tokenizer.image_to_tokens(part.to(device))
        given = [torch.full((len(part),), c) for c in [*classes, no_class]]
        parts.append(torch.stack([log_likelihood(tokens, c).cpu() for c in given], 1))
    nats = torch.cat(parts).double()                                 # (N, classes + 1, K)
    of_class, without = nats[:, :-1], nats[:, -1]
    if labels is None:
        p, order = of_class[0].sum(1).softmax(0).sort(descending=True)
        print("p(class | tokens): " + ", ".join(
            f"{classes[int(c)]} {x:.1%}" for c, x in zip(numbers[order][:5], p)))
        labels = numbers[order[:1]]
    right = (labels[:, None] == numbers).nonzero()[:, 1]             # (N,) place in `classes`
    known, V = of_class[torch.arange(len(nats)), right], tokenizer.config.vocab_size
    bits_table(known, without, tokenizer.scales, V, image.shape[-1])
    print(f"Bayes' rule finds the class (by chance: {1 / len(classes):.1%}) from scales up to")
    for k, side in enumerate(tokenizer.scales):
        found = of_class[:, :, :k + 1].sum(2).argmax(1)              # (N,)
        print(f"    {side}x{side}: {(found == right).double().mean():.1%}")


def bits_table(known, without, scales, V, side):
    """Print bits per scale, token and pixel. known, without: nats (N, K) given the class
    and given none; side: of the images, in pixels"""
    sizes = torch.tensor([s * s for s in scales] + [sum(s * s for s in scales)])
    rows = [("tokens", sizes, 0)]
    for name, nats in (("bits given no class", without), ("bits given the class", known)):
        bits = -nats.mean(0) / math.log(2)                               # (K,)
        bits = torch.cat([bits, bits.sum()[None]])
        rows.append((name, bits, 1))
    rows += [("    per token", bits / sizes, 2), ("    per pixel", bits / side ** 2, 3)]
    print(f"{len(known)} images; without a model a token costs log2 V, {math.log2(V):g} bits")
    print("    side                  " + "".join(f"{text:>9}" for text in [*scales, "all"]))
    for name, values, digits in rows:
        print(f"    {name:<22}" + "".join(f"{x:>9.{digits}f}" for x in values.tolist()))
