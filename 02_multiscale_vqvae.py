"""Chapter 2: an image as K token maps, coarse to fine.

An autoencoder learns to squeeze an image into a small feature map and to rebuild it. It
cannot generate, because nothing tells which feature maps decode to images. (A VAE forces
them towards a Gaussian, from which one can sample, at the price of blur.) Here the map
becomes tokens, and chapter 4 learns which tokens make images.

Chapter 1 quantized a vector, then what was left of it, and so on. Here the rounds are
*scales*, from one token for the whole feature map to one token per cell. Only feature maps
are resized, never the image. Formulas count scales from 1, code counts from 0: `tokens[k]`
is r_{k+1}.

    image 32x32x3 --encode--> f 8x8xC --quantize--> 1   2x2  3x3  4x4  6x6  8x8   token maps
                                                    1 +  4 +  9 + 16 + 36 + 64  = 130 tokens
    f_hat = phi(up(z[r_1])) + phi(up(z[r_2])) + ... + phi(z[r_6])  --decode--> image
    r_k: tokens of scale k; z[r_k]: their codes; phi(h) = 0.5 h + 0.5 conv3x3(h)

Shapes: image (B, 3, H, W) in [-1, 1]; f, f_hat (B, C, h, w), C latent channels; scales
(1, 2, 3, 4, 6, 8): sides of the token maps; tokens: list of K int64 (B, h_k*w_k); L = 130.

Sources: VAR (Tian et al. 2024), Algorithms 1 and 2, equation 5; VQGAN (Esser et al. 2021).
Differs from the original VAR code: it can be trained. scales=(8,) makes it a plain VQ-VAE.

    python 02_multiscale_vqvae.py      trains for seconds, shows images after 1..K scales
"""
from collections import OrderedDict
from dataclasses import dataclass
from importlib import import_module

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

# `import 01_vq` is a syntax error: a module's name cannot start with a digit there.
vq = import_module("01_vq")


@dataclass
class TokenizerConfig:
    """Every size of the tokenizer. Raises ValueError if they do not fit together."""
    image_size: int = 32                 # side of the square image, in pixels
    scales: tuple = (1, 2, 3, 4, 6, 8)   # sides of the token maps
    vocab_size: int = 512                # V, codes for all scales: one vocabulary
    latent_dim: int = 32                 # C, length of a code
    channels: int = 64                   # width of the first convolution
    multipliers: tuple = (1,)            # of `channels` at each resolution
    blocks: int = 1                      # ResidualBlocks per resolution (decoder: one more)
    unshuffle: int = 4                   # first fold 4x4 pixels into channels (1: do not)
    groups: int = 8                      # of GroupNorm
    attention: bool = False              # at the lowest resolution and in the middle
    phis: int = 4                        # small convolutions after upsampling, shared
    residual: bool = True                # False: each scale quantizes f, f_hat is the last
    quantizer: str = "vq"                # a name in QUANTIZERS of chapter 1
    learn: str = "ema"                   # how codes learn: "ema" or "gradient"
    beta: float = 0.25                   # weight of the commitment loss
    coarse: float = 0.2                  # weight in the loss of each f_hat before the last

    def __post_init__(self):
        self.scales, self.multipliers = tuple(self.scales), tuple(self.multipliers)
        if list(self.scales) != sorted(self.scales):
            raise ValueError(f"scales must not shrink, unlike {self.scales}")
        side = self.image_size / (self.unshuffle * 2 ** (len(self.multipliers) - 1))
        if self.scales[-1] != side:
            raise ValueError(f"the last scale must be {side:g} (image_size / downsampling)")
        if self.channels % self.groups:
            raise ValueError(f"channels must be a multiple of {self.groups} groups")
        if self.quantizer == "lfq" and not self.vocab_size == 2 ** self.latent_dim <= 2 ** 24:
            raise ValueError("lfq needs vocab_size = 2**latent_dim, latent_dim at most 24")


# -- The tokenizer -------------------------------------------------------------------------

class MultiScaleVQVAE(nn.Module):
    """Image <-> feature map f <-> tokens of K scales, and the inputs of the transformer."""

    def __init__(self, config):
        super().__init__()
        self.config, self.scales, self.K = config, config.scales, len(config.scales)
        C = config.latent_dim
        self.encoder, self.decoder = make_encoder(config), make_decoder(config)
        self.quant_conv, self.post_quant_conv = conv3x3(C, C), conv3x3(C, C)   # mix cells
        self.quantizer = vq.QUANTIZERS[config.quantizer](config.vocab_size, C, config.learn)
        self.phis = nn.ModuleList(conv3x3(C, C) for _ in range(config.phis))
        self.phi_index = phi_of_scale(self.K, config.phis)
        for i, phi in enumerate(self.phis):
            phi.requires_grad_(i in self.phi_index)        # with few scales some are unused

    def downsample_to(self, f, k):
        """A feature map as the vectors of scale k: each is the mean of its area, which
        minimises the squared error over its cells. (B, C, h, w) -> (B, h_k*w_k, C)"""
        if k < self.K - 1:
            f = F.interpolate(f, size=self.scales[k], mode="area")
        return f.flatten(2).transpose(1, 2)

    def upsample_from(self, x, k):
        """(B, h_k*w_k, C) -> (B, C, h, w). Bicubic: copies would leave block edges."""
        # Exercise 02_1
        x = x.transpose(1, 2).unflatten(2, (self.scales[k], -1))        # (B, C, h_k, w_k)
        if k < self.K - 1:
            x = F.interpolate(x, size=self.scales[-1], mode="bicubic")
        return x

    def embed(self, k, tokens_k):
        """What scale k adds to f_hat: its codes, upsampled, corrected by phi. Tokens may be
        mixtures of codes (B, h_k*w_k, C), see chapter 6. (B, h_k*w_k) -> (B, C, h, w)"""
        # Half of phi is the identity, so that codes pass from the first step on. Four serve
        # all scales, as in the original code (the paper has K): neighbouring scales share.
        z = tokens_k if tokens_k.is_floating_point() else self.quantizer.lookup(tokens_k)
        # Exercise 02_1
        h = self.upsample_from(z, k)                                    # (B, C, h, w)
        return 0.5 * h + 0.5 * self.phis[self.phi_index[k]](h)

    def _add(self, k, f_hat, tokens_k):
        h = self.embed(k, tokens_k)
        return f_hat + h if self.config.residual else h

    def rounds(self, f):
        """Algorithm 1, one scale at a time: yields x (the vectors to quantize), tokens_k,
        f_hat. Each scale sees only what the coarser ones left over."""
        f_hat = torch.zeros_like(f)                                     # (B, C, h, w)
        for k in range(self.K):
            # Exercise 02_2
            # Detached: phi learns from the loss on f_hat alone, not from what it leaves over.
            target = f - f_hat.detach() if self.config.residual else f  # (B, C, h, w)
            x = self.downsample_to(target, k)                           # (B, h_k*w_k, C)
            tokens_k = self.quantizer.nearest(x)                        # (B, h_k*w_k)
            f_hat = self._add(k, f_hat, tokens_k)                       # (B, C, h, w)
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
        """One step of sampling: adds scale k to f_hat (B, C, h, w), which starts as 0.
        -> (f_hat, input of scale k+1 (B, h_{k+1}*w_{k+1}, C), None after the last scale)"""
        f_hat = self._add(k, f_hat, tokens_k)
        return f_hat, self.downsample_to(f_hat, k + 1) if k + 1 < self.K else None

    def teacher_inputs(self, tokens):
        """The transformer's inputs for scales 2..K, all at once: f_hat so far, resized to
        the next map, as in the original code (the paper's figure 4 draws r_k, which only
        corrects what precedes it). tokens -> (B, L - scales[0]**2, C)"""
        # Exercise 02_3
        steps = self.pyramid(tokens)[:-1]                               # K - 1 (B, C, h, w)
        inputs = [self.downsample_to(f_hat, k + 1) for k, f_hat in enumerate(steps)]
        empty = self.phis[0].weight.new_zeros(len(tokens[0]), 0, self.config.latent_dim)
        return torch.cat([empty, *inputs], dim=1)          # K = 1: there are no inputs

    def quantize_with_losses(self, f):
        """Algorithm 1 and its losses; in training mode the codes learn, too.
        f (B, C, h, w) -> (f_hat (B, C, h, w), tokens, vq (), extra ())

            vq = 1/K sum_k w_k (beta |f - sg(f_hat_k)|^2 + |sg(f) - f_hat_k|^2)

        The first part moves the encoder, the second phi (and codes if learn="gradient").
        This is the second term of equation 5. The paper applies it to the last f_hat alone,
        which lets coarse codes collapse; the original code weights all f_hat alike, which
        pulls f towards what few tokens can say. Here w_k = coarse, and the last weight makes
        all K weights sum to K."""
        if self.training and not self.quantizer.initialised:
            self.quantizer.start_on_data(self.unquantized(f.detach()))
        K, beta, coarse = self.K, self.config.beta, self.config.coarse
        groups, tokens, loss, extra = [], [], 0, 0
        for k, (x, tokens_k, f_hat) in enumerate(self.rounds(f)):
            groups.append(x)
            tokens.append(tokens_k)
            # Exercise 02_4
            weight = K - coarse * (K - 1) if k == K - 1 else coarse
            loss = loss + weight * beta * vq.commitment_loss(f, f_hat)
            loss = loss + weight * vq.codebook_loss(f, f_hat)
            # End of exercise
            extra = extra + self.quantizer.extra_loss(x)   # x has a gradient for this alone
        if self.training:
            self.quantizer.learn(groups, tokens)
        return f_hat, tokens, loss / K, extra / K

    def unquantized(self, f):
        """What scales would see if rounding lost nothing: codes start there. -> groups"""
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
        return self.decoder(self.post_quant_conv(f_hat))

    def image_to_tokens(self, image):
        """image (B, 3, H, W) in [-1, 1] -> tokens"""
        return self.quantize(self.encode(image))

    def tokens_to_image(self, tokens):
        """tokens -> image (B, 3, H, W) in [-1, 1]"""
        return self.decode(self.features(tokens)).float().clamp(-1, 1)

    def forward(self, image):
        """image (B, 3, H, W) in [-1, 1] -> (reconstruction (B, 3, H, W), tokens, losses).
        losses: "reconstruction" (squared error), "vq" and "extra" (quantize_with_losses)"""
        f = self.encode(image)                                          # (B, C, h, w)
        with torch.autocast(f.device.type, enabled=False):  # the nearest code needs float32
            f_hat, tokens, vq_loss, extra = self.quantize_with_losses(f.float())
        # Straight-through is applied once, to the sum of all scales. The decoder is trained
        # on this last f_hat alone, although figures decode all of them.
        reconstruction = self.decode(vq.straight_through(f, f_hat))     # (B, 3, H, W)
        error = F.mse_loss(reconstruction.float(), image)
        return reconstruction, tokens, dict(reconstruction=error, vq=vq_loss, extra=extra)


def phi_of_scale(K, phis):
    """Which phi serves which scale: the one whose tick lies nearest to k/(K-1).
    -> list of K ints. (10, 4) -> 0 0 1 1 1 2 2 3 3 3"""
    margin = 1 / 3 / phis if phis == 4 else 1 / 2 / phis   # as in the original code
    ticks = np.linspace(margin, 1 - margin, phis)          # float64 decides exact ties
    return [int(np.argmin(np.abs(ticks - k / max(K - 1, 1)))) for k in range(K)]


# -- Ordinary convolutions (VQGAN) ---------------------------------------------------------

def chain(**layers):
    return nn.Sequential(OrderedDict(layers))


def conv3x3(c_in, c_out):
    return nn.Conv2d(c_in, c_out, 3, padding=1)


class ResidualBlock(nn.Module):
    def __init__(self, c_in, c_out, groups):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(groups, c_in, eps=1e-6), conv3x3(c_in, c_out)
        self.norm2, self.conv2 = nn.GroupNorm(groups, c_out, eps=1e-6), conv3x3(c_out, c_out)
        self.shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x):                                               # (B, c_in, h, w)
        h = self.conv1(F.silu(self.norm1(x)))                           # (B, c_out, h, w)
        return self.shortcut(x) + self.conv2(F.silu(self.norm2(h)))


class Attention(nn.Module):
    """Every cell attends to every cell: one head over h*w positions."""

    def __init__(self, c, groups):
        super().__init__()
        self.norm = nn.GroupNorm(groups, c, eps=1e-6)
        self.qkv, self.proj = nn.Conv2d(c, 3 * c, 1), nn.Conv2d(c, c, 1)

    def forward(self, x):                                               # (B, c, h, w)
        q, k, v = self.qkv(self.norm(x)).flatten(2).transpose(1, 2).chunk(3, dim=2)
        y = F.scaled_dot_product_attention(q, k, v)                     # (B, h*w, c)
        return x + self.proj(y.transpose(1, 2).unflatten(2, x.shape[2:]))


def downsample(c):                       # padded at the bottom and right, as in the original
    return chain(pad=nn.ZeroPad2d((0, 1, 0, 1)), conv=nn.Conv2d(c, c, 3, stride=2))


def upsample(c):
    return chain(nearest=nn.Upsample(scale_factor=2), conv=conv3x3(c, c))


def resolutions(cfg, c, widths, blocks, attention_at, resample):
    """ResidualBlocks of each width, and a step down or up in size between two widths."""
    levels = []
    for i, width in enumerate(widths):
        layers = []
        for _ in range(blocks):
            layers.append(ResidualBlock(c, width, cfg.groups))
            if cfg.attention and i == attention_at:
                layers.append(Attention(width, cfg.groups))
            c = width
        if i < len(widths) - 1:
            layers.append(resample(width))
        levels.append(nn.Sequential(*layers))
    return nn.Sequential(*levels)


def middle(c, cfg):
    attention = [Attention(c, cfg.groups)] if cfg.attention else []
    blocks = ResidualBlock(c, c, cfg.groups), ResidualBlock(c, c, cfg.groups)
    return nn.Sequential(blocks[0], *attention, blocks[1])


def make_encoder(cfg):
    """image (B, 3, H, W) -> (B, C, h, w)"""
    widths, last = [cfg.channels * m for m in cfg.multipliers], len(cfg.multipliers) - 1
    return chain(
        unshuffle=nn.PixelUnshuffle(cfg.unshuffle),                     # (B, 3uu, H/u, W/u)
        conv_in=conv3x3(3 * cfg.unshuffle ** 2, cfg.channels),
        levels=resolutions(cfg, cfg.channels, widths, cfg.blocks, last, downsample),
        middle=middle(widths[-1], cfg),                                 # (B, widest, h, w)
        norm_out=nn.GroupNorm(cfg.groups, widths[-1], eps=1e-6), silu=nn.SiLU(),
        conv_out=conv3x3(widths[-1], cfg.latent_dim))                   # (B, C, h, w)


def make_decoder(cfg):
    """(B, C, h, w) -> image (B, 3, H, W)"""
    widths = [cfg.channels * m for m in reversed(cfg.multipliers)]
    return chain(
        conv_in=conv3x3(cfg.latent_dim, widths[0]),
        middle=middle(widths[0], cfg),                                  # (B, widest, h, w)
        levels=resolutions(cfg, widths[0], widths, cfg.blocks + 1, 0, upsample),
        norm_out=nn.GroupNorm(cfg.groups, widths[-1], eps=1e-6), silu=nn.SiLU(),
        conv_out=conv3x3(widths[-1], 3 * cfg.unshuffle ** 2),           # (B, 3uu, H/u, W/u)
        shuffle=nn.PixelShuffle(cfg.unshuffle))


# -- Demo ----------------------------------------------------------------------------------

def train(tokenizer, images, steps=340):
    optimizer = torch.optim.AdamW(tokenizer.parameters())
    for step in range(steps):                              # warm up, then decay to 0
        optimizer.param_groups[0]["lr"] = 4e-3 * min(1, step / 20) * (1 - step / steps)
        _, _, losses = tokenizer(images[torch.randint(len(images), (8,))])
        optimizer.zero_grad()
        (losses["reconstruction"] + 0.25 * losses["vq"]).backward()
        optimizer.step()
    return tokenizer.eval()


@torch.no_grad()
def show_scales(tokenizer, images):
    """Print what each scale adds. -> {label: images (B, 3, H, W) in [0, 1]}"""
    f = tokenizer.encode(images)                                        # (B, C, h, w)
    before, rows, missing = 0, {"original": images / 2 + 0.5}, []
    print("scale   share of f missing: this map unrounded   rounded   PSNR, dB")
    for k, (x, _, f_hat) in enumerate(tokenizer.rounds(f)):
        unrounded = F.mse_loss(before + tokenizer.upsample_from(x, k), f) / f.square().mean()
        missing.append(F.mse_loss(f_hat, f) / f.square().mean())
        rebuilt = tokenizer.decode(f_hat).clamp(-1, 1)                  # (B, 3, H, W)
        psnr = -10 * torch.log10(F.mse_loss(rebuilt, images) / 4)       # 4: range squared
        label = f"{tokenizer.scales[k]}x{tokenizer.scales[k]}"
        print(f"{label}{unrounded:>43.1%}{missing[-1]:>10.1%}{psnr:>11.1f}")
        rows[f"{label}, {psnr:.1f} dB"] = rebuilt / 2 + 0.5
        before = f_hat
    assert missing == sorted(missing, reverse=True), "every scale must help"
    assert torch.allclose(tokenizer.features(tokenizer.quantize(f)), f_hat)  # Algorithm 2
    return rows


def main():
    from data import shapes
    from report import plots
    torch.manual_seed(0)
    images = torch.from_numpy(shapes.draw(range(512))[0]).permute(0, 3, 1, 2) / 127.5 - 1
    tokenizer = MultiScaleVQVAE(TokenizerConfig(vocab_size=256, channels=32))
    rows = show_scales(train(tokenizer, images), images[:8])
    print("coarse maps lose most by resizing, the last one by rounding alone")
    print("chapter 5 trains longer, for sharper images")
    note = "At 1x1 all cells hold one code; the box comes from zero padding (phi, decoder)."
    plots.save_grid("out/02_multiscale_vqvae.png", rows, footer=note)


if __name__ == "__main__":
    main()
