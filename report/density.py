"""The other half of a generative model: how probable is an image?

The tokens of an image have an exact probability under the transformer (log_likelihood in
chapter 6), which gives

    a measure      -log2 p: bits per token, per scale, per image
    a classifier   p(class | tokens) = p(tokens | class) / the same summed over the classes:
                   Bayes' rule, if all classes are equally common

Many images share the same tokens, so these are probabilities of token maps, not of pixels:
do not compare them with the bits per dimension of models of pixels.
"""
import math

import torch

from data.batches import per_pass
from engine.progress import progress


@torch.no_grad()
def density(tokenizer, log_likelihood, image, labels, classes, no_class):
    """Print bits per scale of images (N, 3, H, W) in [-1, 1], and judge their class.

    log_likelihood(tokens, labels (B,)) -> nats (B, K); labels (N,): the class of each
    image; classes: those to compare; no_class: the label of none"""
    device, scales, parts = next(tokenizer.parameters()).device, tokenizer.scales, []
    for part in progress(image.split(per_pass(image.shape[-1])), len(image)):
        tokens = tokenizer.image_to_tokens(part.to(device))
        nats = [log_likelihood(tokens, [c] * len(part)).cpu() for c in [*classes, no_class]]
        parts.append(torch.stack(nats, 1).double())
    nats = torch.cat(parts)                                       # (N, classes + 1, K)
    bits = -torch.cat([nats, nats.sum(2, keepdim=True)], 2) / math.log(2)   # K + 1: a sum
    right = torch.tensor([list(classes).index(c) for c in labels.tolist()])      # (N,)
    known = bits[torch.arange(len(bits)), right].mean(0)          # (K + 1,)
    found = nats[:, :-1].cumsum(2).argmax(1) == right[:, None]    # (N, K), of scales 1..k
    sizes = torch.tensor([s * s for s in scales] + [sum(s * s for s in scales)])
    print(f"{len(image)} images; without a model a token costs log2 V, "
          f"{math.log2(tokenizer.config.vocab_size):g} bits")
    for name, values, form in (("side", [*scales, "all"], ""),
                               ("bits given no class", bits[:, -1].mean(0), ".1f"),
                               ("bits given the class", known, ".1f"),
                               ("    per token", known / sizes, ".2f"),
                               ("class found so far", found.double().mean(0), ".0%")):
        print(f"    {name:<22}" + "".join(f"{x:>9{form}}" for x in values))
    print("found by Bayes' rule from this scale and the coarser ones; by chance: "
          f"{1 / len(classes):.0%}")
