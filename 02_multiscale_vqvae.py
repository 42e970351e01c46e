"""Chapter 2: an image as K token maps, coarse to fine.

Chapter 1 quantized a vector, then what was left, then what was left of that. Here the rounds are
*scales*: the first has a single token for the whole feature map, the last one token per cell. What
they stand for adds up to the feature map that the decoder turns into an image. Only feature maps
are resized, never the image.

    image 32x32x3 --encode--> f 8x8xC --quantize--> 1   2x2  3x3  4x4  6x6  8x8   token maps
                                                    1 +  4 +  9 + 16 + 36 + 64  = 130 tokens
    f_hat = phi(up(z[r_1])) + phi(up(z[r_2])) + ... + phi(z[r_6])  --decode--> image
    r_k: tokens of scale k, z[r_k]: their codes; phi: half identity, half a 3x3 convolution

Shapes: image (B, 3, H, W) in [-1, 1]; f, f_hat (B, C, h, w); tokens: list of K int64 (B, h_k*w_k);
scales (1, 2, 3, 4, 6, 8) the sides of the token maps; V codes; C latent channels; L = 130.

Sources: VAR (Tian et al. 2024), Algorithms 1 and 2, section 3.2, equation 5 for the loss;
VQGAN (Esser et al. 2021) for encoder and decoder.

A scale errs twice: it is too coarse for the details of f (resizing), and its vectors become codes
(rounding). Finer scales correct both; only the rounding error of the last scale is never corrected.

All scales share one codebook, so that the transformer has one vocabulary and one softmax. Codes are
running means (EMA): trained by gradients they follow slowly, and a few do most of the work (1.5 dB
worse on CIFAR-10, experiments/README.md). Each scale quantizes what coarser scales left over: if
every scale quantized f itself, fine tokens would repeat what coarse ones say (1.4 dB worse).

Differs from the original VAR code: it can be trained, with other quantizers and independent scales
as settings; a plain VQ-VAE is scales=(8,). In the loss each coarse f_hat counts 0.2 and the last
f_hat the rest; the original counts all alike.

    python 02_multiscale_vqvae.py      trains for seconds, shows images after 1..K scales
"""
from collections import OrderedDict
from dataclasses import dataclass
from importlib import import_module

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from data import shapes
from engine import BadInput
from engine.devices import GroupNorm
from report import health, plots

# `import 01_vq` is a syntax error: a module's name cannot start with a digit there.
vq = import_module("01_vq")


@dataclass
class TokenizerConfig:
    """Every size of the tokenizer. Raises BadInput where they do not fit together."""
    image_size: int = 32                         # side of the square image, in pixels
    scales: tuple = (1, 2, 3, 4, 6, 8)           # sides of the token maps, as 1,2,3
    vocab_size: int = 512                        # V, codes shared by all scales
    latent_dim: int = 32                         # C, length of a code
    channels: int = 64                           # width of the first convolution
    multipliers: tuple = (1,)                    # of `channels` at each resolution, as 1,2
    blocks: int = 1                              # ResidualBlocks at each (decoder: one more)
    unshuffle: int = 4                           # fold 4x4 pixels into channels first (1: do not)
    groups: int = 8                              # of GroupNorm
    attention: bool = False                      # at the lowest resolution and in the middle
    phis: int = 4                                # small convolutions after upsampling, shared
    residual: bool = True                        # False: each scale quantizes f, f_hat is the last
    quantizer: str = "vq"                        # a name in QUANTIZERS of chapter 1
    learn: str = "ema"                           # "ema" or "gradient": how learned codes move
    beta: float = 0.25                           # weight of the commitment loss
    coarse: float = 0.2                          # weight in the loss of each f_hat before the last

    def __post_init__(self):
        self.scales, self.multipliers = tuple(self.scales), tuple(self.multipliers)
        check_sizes(self)


# -- The tokenizer ---------------------------------------------------------------------------------

class MultiScaleVQVAE(nn.Module):
    """Image <-> feature map f <-> tokens of K scales, and what the transformer is shown of them."""

    def __init__(self, config):
        super().__init__()
        self.config, self.scales, self.K = config, config.scales, len(config.scales)
        C = config.latent_dim
        # The autoencoder around the quantizer. Two convolutions mix cells: before they are
        # quantized and afterwards.
        self.encoder, self.decoder = make_encoder(config), make_decoder(config)
        self.quant_conv, self.post_quant_conv = conv3x3(C, C), conv3x3(C, C)
        self.quantizer = vq.QUANTIZERS[config.quantizer].build(config.vocab_size, C, config.learn)
        self.phis = nn.ModuleList(conv3x3(C, C) for _ in range(config.phis))
        self.phi_index = phi_of_scale(self.K, config.phis)
        for i, phi in enumerate(self.phis):                # with few scales some serve none of them
            phi.requires_grad_(i in self.phi_index)
        # Resizing is a product with matrices (h_k, h): S f S^t makes a map small, U^t x U large.
        for k, side in enumerate(self.scales):
            S = resize_matrix(self.scales[-1], side, "area")
            U = resize_matrix(side, self.scales[-1], "bicubic").t().contiguous()
            self.register_buffer(f"down{k}", S, persistent=False)
            self.register_buffer(f"up{k}", U, persistent=False)

    def downsample_to(self, f, k):
        """A feature map as the vectors of scale k: each is the mean of its area, the vector that
        differs least from all the cells it stands for. (B, C, h, w) -> (B, h_k*w_k, C)"""
        S = self.get_buffer(f"down{k}")
        small = S @ f @ S.t() if k < self.K - 1 else f
        return small.flatten(2).transpose(1, 2)

    def upsample_from(self, x, k):
        """(B, h_k*w_k, C) -> (B, C, h, w). Bicubic, as copies of a vector would leave edges."""
        U = self.get_buffer(f"up{k}")
        # Exercise 02_1
        x = x.transpose(1, 2).unflatten(2, (self.scales[k], self.scales[k]))
        return U.t() @ x @ U if k < self.K - 1 else x

    def embed(self, k, tokens_k):
        """What scale k adds to f_hat: its codes, upsampled, corrected by phi.
        (B, h_k*w_k) -> (B, C, h, w). Mixtures of codes (B, h_k*w_k, C) may stand for tokens.

        phi turns enlarged codes into what fits f; half of it is the identity, so that codes pass
        from the first step on. As in the original code four of them serve all scales: neighbours
        share, as their residuals look alike, and coarse and fine ones need not."""
        z = tokens_k if tokens_k.is_floating_point() else self.quantizer.lookup(tokens_k)
        # Exercise 02_1
        h = self.upsample_from(z, k)
        return 0.5 * h + 0.5 * self.phis[self.phi_index[k]](h)

    def _add(self, k, f_hat, tokens_k):
        h = self.embed(k, tokens_k)
        return f_hat + h if self.config.residual else h

    def rounds(self, f):
        """Algorithm 1, one scale at a time: yields (the vectors to quantize (B, h_k*w_k, C),
        tokens_k, f_hat). Each scale sees only what the coarser ones left over."""
        f_hat = torch.zeros_like(f)
        for k in range(self.K):
            # Exercise 02_2
            # Detached: codes and phi learn from the loss on f_hat, not through later choices.
            target = f - f_hat.detach() if self.config.residual else f
            x = self.downsample_to(target, k)
            tokens_k = self.quantizer.nearest(x.detach())
            f_hat = self._add(k, f_hat, tokens_k)
            yield x, tokens_k, f_hat

    @torch.no_grad()
    def quantize(self, f):
        """Algorithm 1. f (B, C, h, w) -> tokens"""
        with torch.autocast(f.device.type, enabled=False):  # the nearest code needs float32
            return [tokens_k for _, tokens_k, _ in self.rounds(f.float())]

    def pyramid(self, tokens):
        """f_hat after 1..K scales, coarse to fine. tokens -> list of K (B, C, h, w)"""
        f_hat, steps = 0, []
        for k, tokens_k in enumerate(tokens):
            f_hat = self._add(k, f_hat, tokens_k)
            steps.append(f_hat)
        return steps

    def features(self, tokens):
        """Algorithm 2. tokens -> f_hat (B, C, h, w)"""
        return self.pyramid(tokens)[-1]

    def next_input(self, k, f_hat, tokens_k):
        """One step of sampling: adds scale k to f_hat (B, C, h, w), 0 at k = 0.
        -> (f_hat, input of scale k+1 (B, h_{k+1}*w_{k+1}, C), None after the last scale)"""
        f_hat = self._add(k, f_hat, tokens_k)
        return f_hat, self.downsample_to(f_hat, k + 1) if k + 1 < self.K else None

    def teacher_inputs(self, tokens):
        """The inputs of scales 2..K all at once (section 3.1): f_hat so far, at the size of the
        next map. Not the codes of the map before alone: they only correct what precedes them.
        tokens -> (B, L - scales[0]**2, C)"""
        # Exercise 02_3
        steps = self.pyramid(tokens)[:-1]
        shown = [self.downsample_to(f_hat, k + 1) for k, f_hat in enumerate(steps)]
        empty = self.phis[0].weight.new_zeros(len(tokens[0]), 0, self.config.latent_dim)
        return torch.cat([empty, *shown], dim=1)           # K = 1: there is nothing to show

    def learn_to_quantize(self, f):
        """Algorithm 1 with its losses; in training the quantizer observes all vectors and their
        codes. f (B, C, h, w) -> (f_hat, tokens, equation 5 weighted by scale, extra loss)"""
        if self.training and not self.quantizer.started:
            self.quantizer.start_on_data(self._unquantized(f.detach()))
        groups, tokens, loss, extra = [], [], 0, 0
        for k, (x, tokens_k, f_hat) in enumerate(self.rounds(f)):
            groups.append(x)
            tokens.append(tokens_k)
            # Equation 5 asks this of the last f_hat alone, the original code of every f_hat alike.
            # The first lets coarse codes collapse; the second pulls f towards what few tokens can
            # say. So coarse f_hats count a little, and the last has the rest of the weight K.
            # Exercise 02_4
            last = k == self.K - 1
            weight = self.K - self.config.coarse * (self.K - 1) if last else self.config.coarse
            loss = loss + weight * self.config.beta * vq.commitment_loss(f, f_hat)
            loss = loss + weight * vq.codebook_loss(f, f_hat)        # moves phi (and codes)
            # End of exercise
            extra = extra + self.quantizer.extra_loss(x)
        if self.training:
            self.quantizer.observe(groups, tokens)
        return f_hat, tokens, loss / self.K, extra / self.K

    def _unquantized(self, f):
        """What each scale would see if coarser scales lost nothing: where codes start."""
        f_hat, groups = torch.zeros_like(f), []
        for k in range(self.K):
            groups.append(self.downsample_to(f - f_hat if self.config.residual else f, k))
            f_hat = f_hat + self.upsample_from(groups[-1], k)
        return groups

    def encode(self, image):
        """image (B, 3, H, W) in [-1, 1] -> f (B, C, h, w)"""
        return self.quant_conv(self.encoder(image))

    def decode(self, f_hat):
        """f_hat (B, C, h, w) -> image (B, 3, H, W), about [-1, 1], not clamped"""
        f_hat = f_hat.to(self.post_quant_conv.weight.dtype)          # half, if stored so
        return self.decoder(self.post_quant_conv(f_hat))

    def image_to_tokens(self, image):
        """image (B, 3, H, W) in [-1, 1] -> tokens"""
        return self.quantize(self.encode(image))

    def tokens_to_image(self, tokens):
        """tokens -> image (B, 3, H, W) in [-1, 1]"""
        return self.decode(self.features(tokens)).float().clamp(-1, 1)

    def forward(self, image):
        """image (B, 3, H, W) in [-1, 1] -> (reconstruction (B, 3, H, W), tokens, losses dict)

        losses: "reconstruction" squared error, "vq" equation 5 over all scales, "extra" the
        quantizer's own. Codes learn without gradients, by `quantizer.update()` after each step."""
        f = self.encode(image)
        with torch.autocast(f.device.type, enabled=False):  # the nearest code needs float32
            f_hat, tokens, vq_loss, extra = self.learn_to_quantize(f.float())
        reconstruction = self.decode(vq.straight_through(f, f_hat))
        error = F.mse_loss(reconstruction.float(), image)
        return reconstruction, tokens, dict(reconstruction=error, vq=vq_loss, extra=extra)


def phi_of_scale(K, phis):
    """Which phi serves which scale: the one whose tick lies nearest to k/(K-1).
    -> list of K ints. (10, 4) -> 0 0 1 1 1 2 2 3 3 3"""
    margin = 1 / 3 / phis if phis == 4 else 1 / 2 / phis   # as the original code has it
    ticks = np.linspace(margin, 1 - margin, phis)          # float64: k = 2 of 10 is a near tie
    return [int(np.argmin(np.abs(ticks - k / max(K - 1, 1)))) for k in range(K)]


def resize_matrix(n_in, n_out, mode):
    """Resizing is linear: column i is what becomes of the i-th unit vector. -> (n_out, n_in)
    Two small products per map take less time than F.interpolate."""
    # Made on the CPU even while the model is built without memory.
    eye = torch.eye(n_in, device="cpu")[None, None]
    return F.interpolate(eye, size=(n_in, n_out), mode=mode)[0, 0].t().contiguous()


# -- Ordinary convolutions (VQGAN) -----------------------------------------------------------------

def chain(**layers):
    return nn.Sequential(OrderedDict(layers))


def conv3x3(c_in, c_out):
    return nn.Conv2d(c_in, c_out, 3, padding=1)


class ResidualBlock(nn.Module):
    def __init__(self, c_in, c_out, groups):
        super().__init__()
        self.norm1, self.conv1 = GroupNorm(c_in, groups), conv3x3(c_in, c_out)
        self.norm2, self.conv2 = GroupNorm(c_out, groups), conv3x3(c_out, c_out)
        self.shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x):                                  # (B, c_in, h, w) -> (B, c_out, h, w)
        h = self.conv1(F.silu(self.norm1(x)))
        return self.shortcut(x) + self.conv2(F.silu(self.norm2(h)))


class Attention(nn.Module):
    """Every cell attends to every cell: one head over h*w positions."""

    def __init__(self, c, groups):
        super().__init__()
        self.norm = GroupNorm(c, groups)
        self.qkv, self.proj = nn.Conv2d(c, 3 * c, 1), nn.Conv2d(c, c, 1)

    def forward(self, x):                                  # (B, C, h, w) -> (B, C, h, w)
        q, k, v = self.qkv(self.norm(x)).flatten(2).transpose(1, 2).chunk(3, dim=2)
        y = F.scaled_dot_product_attention(q, k, v)        # (B, h*w, C)
        return x + self.proj(y.transpose(1, 2).unflatten(2, x.shape[2:]))


def downsample(c):
    """An even side needs one row of padding for stride 2; the original adds it at the bottom."""
    return chain(pad=nn.ZeroPad2d((0, 1, 0, 1)), conv=nn.Conv2d(c, c, 3, stride=2))


def upsample(c):
    return chain(nearest=nn.Upsample(scale_factor=2), conv=conv3x3(c, c))


def resolutions(cfg, c, widths, blocks, attention_at, resample):
    """One after another: ResidualBlocks of each width (number `attention_at` with Attention), and
    between two resolutions a step up or down. c: channels of the input"""
    found = []
    for i, width in enumerate(widths):
        layers = []
        for _ in range(blocks):
            layers.append(ResidualBlock(c, width, cfg.groups))
            if cfg.attention and i == attention_at:
                layers.append(Attention(width, cfg.groups))
            c = width
        if i < len(widths) - 1:
            layers.append(resample(width))
        found.append(nn.Sequential(*layers))
    return nn.Sequential(*found)


def middle(c, cfg):
    between = [Attention(c, cfg.groups)] if cfg.attention else []
    return nn.Sequential(ResidualBlock(c, c, cfg.groups), *between, ResidualBlock(c, c, cfg.groups))


def make_encoder(cfg):
    """image (B, 3, H, W) -> (B, C, h, w)"""
    widths = [cfg.channels * m for m in cfg.multipliers]
    return chain(unshuffle=nn.PixelUnshuffle(cfg.unshuffle),               # (B, 3 u u, H/u, W/u)
                 conv_in=conv3x3(3 * cfg.unshuffle ** 2, cfg.channels),
                 levels=resolutions(cfg, cfg.channels, widths, cfg.blocks, len(widths) - 1,
                                    downsample),
                 middle=middle(widths[-1], cfg),                           # (B, widest, h, w)
                 norm_out=GroupNorm(widths[-1], cfg.groups), silu=nn.SiLU(),
                 conv_out=conv3x3(widths[-1], cfg.latent_dim))             # (B, C, h, w)


def make_decoder(cfg):
    """(B, C, h, w) -> image (B, 3, H, W)"""
    widths = [cfg.channels * m for m in cfg.multipliers][::-1]
    return chain(conv_in=conv3x3(cfg.latent_dim, widths[0]),
                 middle=middle(widths[0], cfg),                            # (B, widest, h, w)
                 levels=resolutions(cfg, widths[0], widths, cfg.blocks + 1, 0, upsample),
                 norm_out=GroupNorm(widths[-1], cfg.groups), silu=nn.SiLU(),
                 conv_out=conv3x3(widths[-1], 3 * cfg.unshuffle ** 2),     # (B, 3 u u, H/u, W/u)
                 shuffle=nn.PixelShuffle(cfg.unshuffle))


def check_sizes(cfg):
    """Raises BadInput for settings that do not fit together."""
    if cfg.quantizer not in vq.QUANTIZERS:
        raise BadInput(f"quantizer must be {' or '.join(vq.QUANTIZERS)}, not {cfg.quantizer}")
    sizes = (*cfg.scales, *cfg.multipliers, cfg.phis, cfg.blocks, cfg.vocab_size)
    if not cfg.scales or min(sizes) < 1:
        raise BadInput("scales, multipliers, phis, blocks and vocab_size must be 1 or more")
    if list(cfg.scales) != sorted(set(cfg.scales)):
        raise BadInput(f"scales must grow, not {cfg.scales}")
    if not 0 <= cfg.coarse <= 1:
        raise BadInput(f"coarse must be between 0 and 1, not {cfg.coarse}")
    if any(cfg.channels * m % cfg.groups for m in cfg.multipliers):
        raise BadInput(f"every width, {cfg.channels} times {cfg.multipliers}, must be a multiple "
                       f"of groups, {cfg.groups}")
    side = cfg.image_size / (cfg.unshuffle * 2 ** (len(cfg.multipliers) - 1))
    if cfg.scales[-1] != side:
        raise BadInput(f"the last scale must be {side:g} = image_size / downsampling, not "
                       f"{cfg.scales[-1]}: choose scales, multipliers and unshuffle")
    try:
        with torch.device("meta"):                         # it knows which sizes it can have
            vq.QUANTIZERS[cfg.quantizer].build(cfg.vocab_size, cfg.latent_dim, cfg.learn)
    except ValueError as error:
        raise BadInput(str(error)) from None


# -- Demo ------------------------------------------------------------------------------------------

def train(tokenizer, images, steps=340):
    optimizer = torch.optim.AdamW(tokenizer.parameters())
    for step in range(steps):                              # warm up, then a straight line to 0
        optimizer.param_groups[0]["lr"] = 4e-3 * min(1, step / 20) * (1 - step / steps)
        _, _, losses = tokenizer(images[torch.randint(len(images), (8,))])
        optimizer.zero_grad()
        (losses["reconstruction"] + 0.25 * losses["vq"]).backward()
        optimizer.step()
        tokenizer.quantizer.update()                       # codes learn without gradients
    return tokenizer.eval()


@torch.no_grad()
def main():
    torch.manual_seed(0)
    images = torch.from_numpy(shapes.draw(range(512))[0]).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.enable_grad():
        tokenizer = train(MultiScaleVQVAE(TokenizerConfig(vocab_size=256, channels=32)), images)
    shown = images[:8]
    f = tokenizer.encode(shown)
    before, missing, rows, labels = torch.zeros_like(f), [], [shown], ["original"]
    print("scale   f missing with exact vectors   with codes   PSNR, dB")
    for k, (x, tokens_k, f_hat) in enumerate(tokenizer.rounds(f)):
        exact = before + tokenizer.upsample_from(x, k)     # resized, but not rounded
        lost = [float((f - g).square().mean() / f.square().mean()) for g in (exact, f_hat)]
        rows.append(tokenizer.decode(f_hat).clamp(-1, 1))
        db = float(health.psnr(shown, rows[-1]).mean())
        labels.append(f"{tokenizer.scales[k]}x{tokenizer.scales[k]}, {db:.1f} dB")
        print(f"{labels[-1][:3]}{lost[0]:>33.1%}{lost[1]:>13.1%}{db:>11.1f}")
        before, missing = f_hat, [*missing, lost[1]]
    print("coarse maps lose by resizing (phi regains some of it), the last one by rounding alone")
    assert missing == sorted(missing, reverse=True), "every scale must help"
    undone = tokenizer.features(tokenizer.quantize(f))
    assert torch.allclose(undone, f_hat), "Algorithm 2 undoes Algorithm 1"
    # One token is the same vector in every cell: only zero padding tells the decoder of the rim.
    plots.save_grid("out/02_multiscale_vqvae.png", (torch.cat(rows) + 1) / 2, 8, row_labels=labels,
                    footer=plots.legend("Why a box at 1x1: one token gives every cell the same "
                                        "vector, but zero padding shows where the rim is."))
    print("wrote out/02_multiscale_vqvae.png (soft after so few steps; chapter 5 trains longer)\n"
          "PSNR = 10 log10(range^2 / squared error): 10 dB more is a tenth of the error")


if __name__ == "__main__":
    main()
