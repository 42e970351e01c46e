"""Chapter 6: sample, in-paint, out-paint, change a class, and ask how likely a picture is.

One loop does it all. Scale after scale: predict, choose tokens, add them to f_hat, show the result
to the next scale. Editing differs in one line: where the picture is to be kept, the token is not
drawn but computed, as the rounding of *what is still missing* between the picture and f_hat:

    k        1x1     2x2        3x3          ...      8x8
    keep      .      x .       x x .                 x x x x x . . .     x  rounded from picture
                     x .       x x .                 x x x x x . . .     .  drawn by the model

Shapes: labels (B,); logits (B, n, V), n = h_k*w_k; tokens: list of K (B, n); image (B, 3, H, W) in
[-1, 1] coming in, [0, 1] going out; keep (H, W) bool, True = leave as it is.

Sources: VAR (Tian et al. 2024), sections 3 and 5 (zero-shot editing); classifier-free guidance (Ho
and Salimans 2022); top-p sampling (Holtzman et al. 2020); FID (Heusel et al. 2017).

Differs from the original VAR code: what is hidden is hidden before encoding (there the encoder sees
the whole picture, and hidden pixels leak into the tokens that are kept); the 1x1 token is not
always kept; kept tokens are rounded again as f_hat grows, not replayed from another picture; the
likelihood, which training minimised all along, can be asked for.

The command line is in report/studio.py; the pictures and tables made of all this are in
report/gallery.py, report/density.py and report/judge.py.

    python 06_sample_and_edit.py                        newest run in out/, else the shipped model
    python 06_sample_and_edit.py --task inpaint --box 0.3 0.3 0.7 0.7
    python 06_sample_and_edit.py --released d16 --classes goldfish volcano
"""
import sys
from importlib import import_module

import torch
import torch.nn.functional as F

from engine import BadInput, released
from engine.options import one_line
from report.studio import Studio, read_arguments

vqvae = import_module("02_multiscale_vqvae")
transformer = import_module("04_var_transformer")
training = import_module("05_train")


# -- Drawing tokens --------------------------------------------------------------------------------

def keep_likely(logits, top_k=0, top_p=0.0):
    """Set all but the likely logits to -inf, in a copy. top_k > 0 leaves exactly k, also when
    several are equally likely; 0 < top_p < 1 leaves the fewest that together hold top_p or more.
    (..., V) -> (..., V)"""
    V, k = logits.shape[-1], top_k if top_k > 0 else logits.shape[-1]
    if k >= V and not 0 < top_p < 1:
        return logits
    value, order = logits.topk(min(k, V), dim=-1)          # likeliest first
    if 0 < top_p < 1:
        less_likely = value.softmax(-1).flip(-1).cumsum(-1).flip(-1)       # this one included
        drop = less_likely <= 1 - top_p
        drop[..., 0] = False                               # the likeliest always stays
        value = value.masked_fill(drop, -torch.inf)
    return torch.full_like(logits, -torch.inf).scatter(-1, order, value)


def draw(logits, generator=None):
    """One token per position. logits (B, n, V) -> (B, n)"""
    p = logits.softmax(-1).flatten(0, 1)
    return torch.multinomial(p, 1, replacement=True, generator=generator).view(logits.shape[:2])


def soften(logits, ratio, codebook, generator=None):
    """"Smooth" sampling of the original: a mixture of codes by Gumbel-softmax instead of one code;
    pleasant to look at, not a sample from the model. -> code vectors (B, n, C)"""
    noise = torch.empty_like(logits).exponential_(generator=generator).log()
    temperature = max(0.27 * (1 - 0.95 * ratio), 0.005)
    return ((logits * (1 + ratio) - noise) / temperature).softmax(-1) @ codebook


@torch.no_grad()
def sample_tokens(tokenizer, var, labels, *, cfg=0.0, top_k=0, top_p=0.0, temperature=1.0,
                  smooth=False, generator=None, choose=None):
    """The loop. choose(k, tokens_k, f_hat) may replace drawn tokens. labels (B,) -> K token maps
    (B, n), or with `smooth` mixtures of codes (B, n, C), which do as well.

    Guidance: logits = (1 + t) conditional - t unconditional, t = cfg * k / (K - 1). It ramps up
    with the scale because the coarse scales decide *what* is drawn: strong guidance there makes all
    pictures alike; at fine scales it only sharpens. At the first scale t = 0."""
    if len(labels) == 0 or labels.min() < 0 or labels.max() > var.config.num_classes:
        raise BadInput(f"labels must lie in 0..{var.config.num_classes - 1} "
                       f"({var.config.num_classes}: no class)")
    K, B = tokenizer.K, len(labels)
    if cfg > 0:                                            # second half: "no class", a learnt row
        labels = torch.cat([labels, torch.full_like(labels, var.config.num_classes)])
    conditioning, cache = var.conditioning(labels), var.new_cache()
    f_hat, inputs, tokens = 0, None, []
    for k in range(K):
        ratio = k / max(K - 1, 1)
        if inputs is not None:
            inputs = inputs.to(conditioning[0].dtype).repeat(2 if cfg > 0 else 1, 1, 1)
        logits = var.step(k, inputs, conditioning, cache).float()
        if cfg > 0:
            t = cfg * ratio
            logits = (1 + t) * logits[:B] - t * logits[B:]
        logits = keep_likely(logits / temperature, top_k, top_p)
        if smooth:
            tokens_k = soften(logits, ratio, tokenizer.quantizer.codebook, generator)
        else:
            tokens_k = draw(logits, generator)
        if choose is not None:
            tokens_k = choose(k, tokens_k, f_hat)
        f_hat, inputs = tokenizer.next_input(k, f_hat, tokens_k)
        tokens.append(tokens_k)
    return tokens


def to_picture(tokenizer, f_hat):
    """f_hat -> image (B, 3, H, W) in [0, 1]"""
    with torch.no_grad():
        return (tokenizer.decode(f_hat).float().clamp(-1, 1) + 1) / 2


def generate(tokenizer, var, labels, *, cfg=1.5, top_k=0, top_p=0.0, temperature=1.0, smooth=False,
             generator=None, tokens=None, keep=None):
    """Sample pictures of the classes in labels (B,). -> (B, 3, H, W) in [0, 1]

    tokens (list of K (B, n)) and keep (list of K (n,) bool): where keep is True the given token is
    replayed instead of drawn. Raises BadInput for a label the model does not know."""

    if (tokens is None) != (keep is None) or (smooth and tokens is not None):
        raise BadInput("tokens and keep go together, and without smooth")

    def replay(k, tokens_k, f_hat):
        return torch.where(keep[k].to(tokens_k.device), tokens[k], tokens_k)
    drawn = sample_tokens(tokenizer, var, labels, cfg=cfg, top_k=top_k, top_p=top_p, smooth=smooth,
                          temperature=temperature, generator=generator,
                          choose=replay if tokens is not None else None)
    return to_picture(tokenizer, tokenizer.features(drawn))


@torch.no_grad()
def log_likelihood(tokenizer, var, tokens, labels):
    """ln p(tokens | class), exactly: the sum over scales, and over the positions of each, of
    ln p(token | coarser scales, class). One pass through the transformer has them all.

    tokens: list of K (B, n); labels (B,), num_classes: no class -> (B, K) nats, per scale"""
    inputs = tokenizer.teacher_inputs(tokens).to(var.start.dtype)
    logits = var(labels, inputs).float()                                 # (B, L, V)
    wanted = torch.cat(tokens, 1)[..., None]                             # (B, L, 1)
    each = logits.log_softmax(-1).gather(-1, wanted)[..., 0]             # (B, L)
    return torch.stack([part.sum(1) for part in each.split([t.shape[1] for t in tokens], 1)], 1)


# -- Editing ---------------------------------------------------------------------------------------

def hide(image, keep):
    """Replace hidden pixels by a smooth continuation of the kept ones, so that the encoder meets no
    edge that is not in the picture. Reads kept pixels only. image (B, 3, H, W), keep (H, W)"""
    weight = keep.to(image.dtype)[None, None]
    value, levels = torch.where(keep, image, 0.0), []
    while max(value.shape[2:]) > 1:                        # averages over ever larger windows ...
        levels.append((value, weight))
        value, weight = (F.avg_pool2d(x, 2, ceil_mode=True) for x in (value, weight))
    filled = value / weight.clamp(min=1e-6)
    for value, weight in reversed(levels):                 # ... give way to finer ones where known
        filled = F.interpolate(filled, value.shape[2:], mode="bilinear")
        filled = torch.where(weight > 0, value / weight.clamp(min=1e-6), filled)
    return filled


def edit(tokenizer, var, image, keep, labels, *, cfg=1.5, top_k=0, top_p=0.0, temperature=1.0,
         generator=None, paste=False, soft=0, replay=False, looks=(6, 2)):
    """Repaint the part of a picture where keep is False, as class labels (B,).

    image (B, 3, H, W) in [-1, 1], keep (H, W) bool -> (B, 3, H, W) in [0, 1]. Hidden pixels are
    replaced before anything reads the picture: they cannot change the result.

    paste: put the kept pixels themselves back over the tokenizer's rendering of them, over `soft`
    pixels from the edge ever more. looks: how often to paint, and then to look without painting.
    replay, with looks=(1, 0): keep the picture's tokens whatever is drawn around them, as the
    paper's demo does (but for its leak), for comparison."""
    side = tokenizer.config.image_size
    if not tuple(image.shape[-2:]) == tuple(keep.shape) == (side, side):
        raise BadInput(f"picture and mask must be {side}x{side}, not {tuple(image.shape[-2:])} and "
                       f"{tuple(keep.shape)}")
    keep = keep.to(image.device)
    if generator is None:
        generator = torch.Generator(keep.device).manual_seed(int(torch.randint(2**62, ())))
    start, shown = generator.get_state(), hide(image, keep)
    # Cells of which half or more is kept count as known; the rest of such a cell is continued.
    whole = F.adaptive_avg_pool2d(keep.float()[None, None], tokenizer.scales[-1])
    known = (whole >= 0.5).to(image.dtype)

    def choose(k, tokens_k, f_hat):
        """Half of a cell known is enough to fix its token: what it gets wrong of the kept part, the
        finer scales put right, since they round what is still missing."""
        missing = target - f_hat if tokenizer.config.residual else target
        filled = torch.ones_like(known) if look else known               # a painting counts too
        r = tokenizer.look_at(missing * filled, k) / tokenizer.look_at(filled, k).clamp(min=1e-6)
        kept = seen[k] if replay else tokenizer.quantizer.nearest(r)
        return torch.where(tokenizer.look_at(known, k)[..., 0] >= 0.5, kept, tokens_k)

    # At first the hidden part is a blur, and coarse maps, a few tokens for the whole picture, know
    # half of it. So paint again beside what was painted, with the same random numbers, until both
    # parts agree. Last, the tokenizer alone looks at kept and painted as at any picture.
    for look in range(sum(looks) if keep.any() else 1):
        with torch.no_grad():
            target = tokenizer.encode(shown)
        tokens = seen = tokenizer.quantize(target)
        if look < looks[0]:
            generator.set_state(start)
            tokens = sample_tokens(tokenizer, var, labels, cfg=cfg, top_k=top_k, top_p=top_p,
                                   temperature=temperature, generator=generator, choose=choose)
        result = to_picture(tokenizer, tokenizer.features(tokens))
        shown = torch.where(keep, image, 2 * result - 1)
    if paste or soft:
        weight = fade(keep, soft)
        result = weight * ((shown + 1) / 2) + (1 - weight) * result
    return result


def fade(keep, soft):
    """How much a kept pixel counts: 1 from `soft` pixels off the edge on, less nearer to it, 0
    where hidden. keep (H, W) bool -> (H, W)"""
    hidden = (~keep).float()[None, None]
    deep = 1 - hidden
    for _ in range(soft):                                  # one pixel further in
        hidden = F.max_pool2d(hidden, 3, 1, 1)
        deep = deep + 1 - hidden
    return deep[0, 0] / (soft + 1)


def outpaint(tokenizer, var, image, grow, labels, *, soft=None, generator=None, **how):
    """Let the canvas grow by (left, top, right, bottom) pixels around the picture. Window after
    window of the model's size is edited, always the one of which most is known, an eighth further
    (or a cell of the last map: half a cell would count as known and nothing be drawn).

    image (B, 3, S, S) in [-1, 1] -> (B, 3, top + S + bottom, left + S + right) in [0, 1]. What is
    known stays as it is but for a blend over `soft` pixels from its edge (S/8; 0: none); `how`:
    cfg, top_k, ... of edit()."""
    (left, top, right, bottom), S = grow, tokenizer.config.image_size
    if tuple(image.shape[-2:]) != (S, S):
        raise BadInput(f"the picture must be {S}x{S}, not {tuple(image.shape[-2:])}")
    soft, cell = S // 8 if soft is None else soft, S // tokenizer.scales[-1]
    step = max(cell, S // 8 // cell * cell)
    canvas = F.pad(image, (left, right, top, bottom))
    known = F.pad(torch.ones(S, S, dtype=torch.bool, device=image.device),
                  (left, right, top, bottom))

    def outwards(room):
        return [n for n in range(room, 0, -step) if n >= step or n == room]
    ys, xs = (sorted([a, *[a - n for n in outwards(a)], *[a + n for n in outwards(b)]])
              for a, b in ((top, bottom), (left, right)))
    windows = [(slice(y, y + S), slice(x, x + S)) for y in ys for x in xs]
    while not known.all():
        at = max((at for at in windows if not known[at].all()), key=lambda at: int(known[at].sum()))
        before, weight = canvas[(..., *at)], fade(known[at], soft)
        painted = edit(tokenizer, var, before, known[at], labels, generator=generator,
                       **{"looks": (2, 2), **how})
        canvas[(..., *at)] = weight * before + (1 - weight) * (2 * painted - 1)
        known[at] = True
    return (canvas + 1) / 2


# -- The paper's weights, and the command line -----------------------------------------------------

def load_released(tokenizer_state, var_state, scales=None, heads=None):
    """State dicts in the released layout -> (tokenizer, var), ready to sample. Sizes are read off
    the shapes; `scales` is needed only for schedules other than the paper's two, `heads` only for
    models without query/key normalisation. Raises BadInput for anything in another layout."""
    sizes, weights = released.read_transformer(var_state, scales, heads)
    tokenizer_sizes, tokenizer_weights = released.read_tokenizer(tokenizer_state, sizes["scales"])
    with released.other_layouts_refused(), torch.device("meta"):    # no time for random weights
        tokenizer = vqvae.MultiScaleVQVAE(vqvae.TokenizerConfig(**tokenizer_sizes))
        var = transformer.VAR(transformer.VARConfig(**sizes))
    tokenizer = released.fill(tokenizer, tokenizer_weights).to(memory_format=torch.channels_last)
    return tokenizer, released.fill(var, weights)


def main():
    studio = Studio(read_arguments(__doc__.splitlines()[0]), sys.modules[__name__])
    for task in studio.tasks():
        task(studio)


if __name__ == "__main__":
    one_line(main)
