"""Chapter 2: a picture as K token maps, coarse to fine.

Chapter 1 rounded a vector, then what was left, then what was left of that. Here the levels of
rounding are *scales*: the first may use a single token for the whole feature map, the last one
token per cell. Together they add up to the feature map that the decoder turns into a picture.

    picture 32x32x3 --encode--> f 8x8xC --quantize--> 1   2x2  3x3  4x4  6x6  8x8   token maps
                                                      1 +  4 +  9 + 16 + 36 + 64  = 130 tokens
    f_hat = phi(up(z[r_1])) + phi(up(z[r_2])) + ... + phi(z[r_6])  --decode--> picture
    where phi(x) = x/2 + conv(x)/2; there are four such convolutions, neighbouring scales share

Shapes: image (B, 3, H, W) in [-1, 1]; f, f_hat (B, C, h, w); tokens: list of K int64 (B, h_k*w_k);
scales (1, 2, 3, 4, 6, 8) the sides of the token maps; V codes; C latent channels; L = 130.

Sources: VAR (Tian et al. 2024), Algorithms 1 and 2, section 3.2, equation 5 for the loss;
VQGAN (Esser et al. 2021) for encoder and decoder.

Codes are running means (EMA), moved when nobody uses them: codes that wait for gradients sit still
whenever they are not chosen, so few get all the work. And scales round what is left: else every
token would say again what coarser ones said (README, "Which codes": 1.5 dB and 1.4 dB).

Differs from the original VAR code: it can be trained; an ordinary (independent) pyramid and
lookup-free quantization are settings; a plain VQ-VAE is scales=(8,); resizing is two small matrix
products, because the sizes never change.

    python 02_multiscale_vqvae.py      trains for seconds, shows one picture after 1..K scales
"""
from dataclasses import dataclass
from importlib import import_module

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from data import shapes
from engine import BadInput
from report import plots

vq = import_module("01_vq")


@dataclass
class TokenizerConfig:
    """Every size of the tokenizer."""
    image_size: int = 32                         # side of the square picture, in pixels
    scales: tuple = (1, 2, 3, 4, 6, 8)           # sides of the token maps, as 1,2,3
    vocab_size: int = 512                        # V, codes shared by all scales
    latent_dim: int = 32                         # C, length of a code
    channels: int = 64                           # width of the first convolution
    multipliers: tuple = (1,)                    # widths of levels, as 1,2; the last keeps the side
    blocks: int = 1                              # residual blocks per level (decoder: one more)
    unshuffle: int = 4                           # fold 4x4 pixels into channels first (1: do not)
    groups: int = 8                              # of GroupNorm
    attention: bool = False                      # self-attention at the lowest level and the middle
    phis: int = 4                                # small convolutions after upsampling, shared
    residual: bool = True                        # False: every scale quantizes the whole map
    quantizer: str = "vq"                        # "vq" learned codes, "lfq" signs (V = 2**C)
    learn: str = "ema"                           # "ema" or "gradient": how learned codes move
    beta: float = 0.25                           # weight of the commitment loss
    coarse: float = 0.2                          # weight of coarser f_hats; the last has the rest

    def __post_init__(self):
        self.scales, self.multipliers = tuple(self.scales), tuple(self.multipliers)
        if self.quantizer not in ("vq", "lfq") or self.learn not in ("ema", "gradient"):
            raise BadInput("quantizer must be vq or lfq and learn ema or gradient, not "
                           f"{self.quantizer} and {self.learn}")
        if not self.scales or min(self.phis, self.blocks, self.vocab_size, *self.multipliers) < 1:
            raise BadInput("scales, phis, blocks, vocab_size and multipliers must be 1 or more")
        if not 0 <= self.coarse <= 1:
            raise BadInput(f"coarse must be between 0 and 1, not {self.coarse}")
        if any(self.channels * m % self.groups for m in self.multipliers):
            raise BadInput(f"every width, {self.channels} times {self.multipliers}, must be a "
                           f"multiple of groups, {self.groups}")
        side = self.image_size / (self.unshuffle * 2 ** (len(self.multipliers) - 1))
        if self.scales[-1] != side:
            raise BadInput(f"the last scale must be {side:g} = image_size / downsampling, not "
                           f"{self.scales[-1]}: choose scales, multipliers and unshuffle")
        if list(self.scales) != sorted(set(self.scales)) or self.scales[0] < 1:
            raise BadInput(f"scales must grow from 1 or more, not {self.scales}")
        if self.quantizer == "lfq" and self.latent_dim > 24:
            raise BadInput(f"lfq has one bit per channel and allows 24, not {self.latent_dim}")
        if self.quantizer == "lfq" and self.vocab_size != 2 ** self.latent_dim:
            raise BadInput(f"lfq needs vocab_size = 2**latent_dim = {2 ** self.latent_dim}")


class GroupNorm(nn.GroupNorm):
    """In the working precision under autocast, whose own rule for CUDA is float32: twice the bytes
    and two more copies of every activation. (Inside, the kernel sums in float32 all the same.)"""
    mixed = ("cpu",)                                       # take half x with float32 weights

    def forward(self, x):
        dtype = self.weight.dtype if x.device.type in self.mixed else x.dtype
        with torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False):
            return F.group_norm(x, self.num_groups, self.weight.to(dtype), self.bias.to(dtype),
                                self.eps)


def norm(channels, groups):
    return GroupNorm(groups, channels, eps=1e-6)


class ResidualBlock(nn.Module):
    def __init__(self, c_in, c_out, groups):
        super().__init__()
        self.norm1, self.conv1 = norm(c_in, groups), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2, self.conv2 = norm(c_out, groups), nn.Conv2d(c_out, c_out, 3, padding=1)
        self.shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x):                                  # (B, c_in, h, w) -> (B, c_out, h, w)
        h = self.conv1(F.silu(self.norm1(x)))
        return self.shortcut(x) + self.conv2(F.silu(self.norm2(h)))


class Attention(nn.Module):
    """Every cell looks at every cell: one head over h*w positions."""

    def __init__(self, c, groups):
        super().__init__()
        self.norm = norm(c, groups)
        self.qkv, self.proj = nn.Conv2d(c, 3 * c, 1), nn.Conv2d(c, c, 1)

    def forward(self, x):                                  # (B, C, h, w) -> (B, C, h, w)
        q, k, v = self.qkv(self.norm(x)).flatten(2).transpose(1, 2).chunk(3, dim=2)
        y = F.scaled_dot_product_attention(q, k, v)        # (B, h*w, C)
        return x + self.proj(y.transpose(1, 2).unflatten(2, x.shape[2:]))


class Downsample(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, stride=2)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)))           # the odd row goes below, not above


class Upsample(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


def level(c_in, c_out, blocks, attention, groups, resample):
    """Residual blocks of one resolution, each followed by attention if asked, then up or down."""
    layers = []
    for i in range(blocks):
        layers.append(ResidualBlock(c_in if i == 0 else c_out, c_out, groups))
        if attention:
            layers.append(Attention(c_out, groups))
    return nn.Sequential(*layers, *([resample(c_out)] if resample else []))


def middle(c, attention, groups):
    looks = [Attention(c, groups)] if attention else []
    return nn.Sequential(ResidualBlock(c, c, groups), *looks, ResidualBlock(c, c, groups))


class Encoder(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        widths = [cfg.channels * m for m in cfg.multipliers]
        last = len(widths) - 1
        self.unshuffle = cfg.unshuffle
        self.conv_in = nn.Conv2d(3 * cfg.unshuffle ** 2, cfg.channels, 3, padding=1)
        self.levels = nn.Sequential(*[
            level(widths[i - 1] if i else cfg.channels, w, cfg.blocks,
                  cfg.attention and i == last, cfg.groups, Downsample if i < last else None)
            for i, w in enumerate(widths)])
        self.middle = middle(widths[-1], cfg.attention, cfg.groups)
        self.norm_out = norm(widths[-1], cfg.groups)
        self.conv_out = nn.Conv2d(widths[-1], cfg.latent_dim, 3, padding=1)

    def forward(self, image):                              # (B, 3, H, W)
        x = F.pixel_unshuffle(image, self.unshuffle)       # (B, 3 u u, H/u, W/u)
        x = self.middle(self.levels(self.conv_in(x)))      # (B, widest, h, w)
        return self.conv_out(F.silu(self.norm_out(x)))     # (B, C, h, w)


class Decoder(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        widths = [cfg.channels * m for m in cfg.multipliers][::-1]
        last = len(widths) - 1
        self.unshuffle = cfg.unshuffle
        self.conv_in = nn.Conv2d(cfg.latent_dim, widths[0], 3, padding=1)
        self.middle = middle(widths[0], cfg.attention, cfg.groups)
        self.levels = nn.Sequential(*[
            level(widths[max(i - 1, 0)], w, cfg.blocks + 1,
                  cfg.attention and i == 0, cfg.groups, Upsample if i < last else None)
            for i, w in enumerate(widths)])
        self.norm_out = norm(widths[-1], cfg.groups)
        self.conv_out = nn.Conv2d(widths[-1], 3 * cfg.unshuffle ** 2, 3, padding=1)

    def forward(self, f_hat):                              # (B, C, h, w)
        x = self.levels(self.middle(self.conv_in(f_hat)))  # (B, narrowest, H/u, W/u)
        x = self.conv_out(F.silu(self.norm_out(x)))        # (B, 3 u u, H/u, W/u)
        return F.pixel_shuffle(x, self.unshuffle)          # (B, 3, H, W)


def resize_matrix(n_in, n_out, mode):
    """Resizing is linear: column i is what becomes of the i-th unit vector. -> (n_out, n_in)"""
    eye = torch.eye(n_in, device="cpu")[None, None]        # a real one, also in a model on "meta"
    return F.interpolate(eye, size=(n_in, n_out), mode=mode)[0, 0].t().contiguous()


def phi_of_scale(K, phis):
    """Which phi serves which scale: the one whose tick lies nearest to k/(K-1). Neighbouring scales
    share, as their residuals look alike. -> list of K ints. (10, 4) -> 0 0 1 1 1 2 2 3 3 3"""
    margin = 1 / 3 / phis if phis == 4 else 1 / 2 / phis   # as the original code has it
    ticks = np.linspace(margin, 1 - margin, phis)          # float64: k = 2 of 10 is a near tie
    return [int(np.argmin(np.abs(ticks - k / max(K - 1, 1)))) for k in range(K)]


class MultiScaleVQVAE(nn.Module):
    """The tokenizer: stage 1 of VAR. See the module's docstring for the shapes."""

    def __init__(self, config):
        super().__init__()
        self.config = cfg = config
        self.scales, self.K = cfg.scales, len(cfg.scales)
        self.encoder, self.decoder = Encoder(cfg), Decoder(cfg)
        self.quant_conv = nn.Conv2d(cfg.latent_dim, cfg.latent_dim, 3, padding=1)
        self.post_quant_conv = nn.Conv2d(cfg.latent_dim, cfg.latent_dim, 3, padding=1)
        if cfg.quantizer == "lfq":
            self.quantizer = vq.LookupFreeQuantizer(cfg.latent_dim, cfg.beta)
        else:
            self.quantizer = vq.VectorQuantizer(cfg.vocab_size, cfg.latent_dim, cfg.beta, cfg.learn)
        self.phis = nn.ModuleList(nn.Conv2d(cfg.latent_dim, cfg.latent_dim, 3, padding=1)
                                  for _ in range(cfg.phis))
        self.phi_index = phi_of_scale(self.K, cfg.phis)
        for i, phi in enumerate(self.phis):                # with few scales some serve none of them
            phi.requires_grad_(i in self.phi_index)
        # In no checkpoint. By F.interpolate, Algorithm 1 at 16x16 takes 2.7 times as long on a CPU.
        full = self.scales[-1]
        self.register_buffer("down", torch.cat([resize_matrix(full, side, "area")
                                                for side in self.scales]), persistent=False)
        self.register_buffer("up", torch.cat([resize_matrix(side, full, "bicubic").t()
                                              for side in self.scales]), persistent=False)

    # Pictures and feature maps

    def encode(self, image):
        """image (B, 3, H, W) in [-1, 1] -> f (B, C, h, w)"""
        return self.quant_conv(self.encoder(image))

    def decode(self, f_hat):
        """f_hat (B, C, h, w) -> image (B, 3, H, W), about [-1, 1], not clamped"""
        f_hat = f_hat.to(self.post_quant_conv.weight.dtype)          # half, if stored so
        return self.decoder(self.post_quant_conv(f_hat))

    # Feature maps and tokens

    def embed(self, k, tokens_k):
        """What scale k adds: codes, upsampled, smoothed by phi. (B, h_k*w_k) -> (B, C, h, w).
        Mixtures of codes (B, h_k*w_k, C), as in smooth sampling, may stand for tokens."""
        side = self.scales[k]
        z = tokens_k if tokens_k.is_floating_point() else self.quantizer.lookup(tokens_k)
        h = self.upsample(z.transpose(1, 2).unflatten(2, (side, side)), k)
        return 0.5 * h + 0.5 * self.phis[self.phi_index[k]](h)

    def look_at(self, target, k):
        """A feature map as the (B, h_k*w_k, C) vectors that scale k rounds or is shown."""
        return self.downsample(target, k).flatten(2).transpose(1, 2)

    def downsample(self, f, k):
        """(B, C, h, w) -> (B, C, h_k, w_k), as F.interpolate(mode="area")"""
        matrix = self.down.split(self.scales)[k]
        return matrix @ f @ matrix.t() if k < self.K - 1 else f

    def upsample(self, z, k):
        """(B, C, h_k, w_k) -> (B, C, h, w), as F.interpolate(mode="bicubic")"""
        matrix = self.up.split(self.scales)[k]
        return matrix.t() @ z @ matrix if k < self.K - 1 else z

    def _rounds(self, f):
        """Algorithm 1, one scale a turn: yields (vectors rounded (B, h_k*w_k, C), tokens_k, f_hat).
        Each scale sees only what the coarser ones left over."""
        f_hat = torch.zeros_like(f)
        for k in range(self.K):
            target = f - f_hat.detach() if self.config.residual else f
            x = self.look_at(target, k)
            tokens_k = self.quantizer.nearest(x.detach())
            f_hat = self._add(k, f_hat, tokens_k)
            yield x, tokens_k, f_hat

    def _add(self, k, f_hat, tokens_k):
        h = self.embed(k, tokens_k)
        return f_hat + h if self.config.residual else h

    @torch.no_grad()
    def quantize(self, f):
        """Algorithm 1. f (B, C, h, w) -> tokens"""
        with torch.autocast(f.device.type, enabled=False):
            return [tokens_k for _, tokens_k, _ in self._rounds(f.float())]

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

    def image_to_tokens(self, image):
        """image (B, 3, H, W) in [-1, 1] -> tokens"""
        return self.quantize(self.encode(image))

    def tokens_to_image(self, tokens):
        """tokens -> image (B, 3, H, W) in [-1, 1]"""
        return self.decode(self.features(tokens)).float().clamp(-1, 1)

    # What the transformer is shown

    def next_input(self, k, f_hat, tokens_k):
        """One step of sampling: adds scale k to f_hat (B, C, h, w; zeros or 0 at k = 0).
        -> (f_hat, input of scale k+1 (B, h_{k+1}*w_{k+1}, C), None after the last scale)"""
        f_hat = self._add(k, f_hat, tokens_k)
        return f_hat, self.look_at(f_hat, k + 1) if k + 1 < self.K else None

    def teacher_inputs(self, tokens):
        """The inputs of scales 2..K all at once: what has been rebuilt so far, at the size of the
        next map (section 3.1). tokens -> (B, L - scales[0]**2, C)"""
        steps = self.pyramid(tokens)[:-1]
        shown = [self.look_at(f_hat, k + 1) for k, f_hat in enumerate(steps)]
        empty = self.phis[0].weight.new_zeros(len(tokens[0]), 0, self.config.latent_dim)
        return torch.cat([empty, *shown], dim=1)           # K = 1: there is nothing to show

    # Training

    def forward(self, image):
        """image (B, 3, H, W) in [-1, 1] -> (reconstruction (B, 3, H, W), tokens, losses dict)

        losses: "reconstruction" mean squared error of the picture, "vq" equation 5 averaged over
        the f_hats after every scale, most of all the last, "extra" the quantizer's own (entropy)
        term."""
        f = self.encode(image)
        with torch.autocast(f.device.type, enabled=False):  # rounding to the nearest needs float32
            f_hat, tokens, vq_loss, extra = self._learn_to_round(f.float())
        # Straight through: the decoder's gradient reaches the encoder as if nothing were rounded.
        reconstruction = self.decode(f + (f_hat - f).detach())
        losses = {"reconstruction": F.mse_loss(reconstruction.float(), image), "vq": vq_loss,
                  "extra": extra}
        return reconstruction, tokens, losses

    def _learn_to_round(self, f):
        if self.training and not self.quantizer.started:
            self.quantizer.start_on_data(self._unrounded(f.detach()))
        groups, tokens, vq_loss, extra = [], [], 0, 0
        for k, (x, tokens_k, f_hat) in enumerate(self._rounds(f)):
            groups.append(x)
            tokens.append(tokens_k)
            # Equation 5 asks this of the last f_hat alone, and the original code of every f_hat
            # alike. The first lets coarse codes collapse; the second bends f towards what few
            # tokens can say. A little weight on coarse scales is better than both.
            last = k == self.K - 1
            weight = self.K - self.config.coarse * (self.K - 1) if last else self.config.coarse
            # The encoder commits to f_hat (times beta); f_hat, that is codes and phi, follows f.
            vq_loss = vq_loss + weight * self.config.beta * F.mse_loss(f, f_hat.detach())
            vq_loss = vq_loss + weight * F.mse_loss(f_hat, f.detach())
            extra = extra + self.quantizer.extra_loss(x)
        if self.training:
            self.quantizer.observe(groups, tokens)         # they move after the optimizer's step
        return f_hat, tokens, vq_loss / self.K, extra / self.K

    def _unrounded(self, f):
        """What each scale would see if coarser scales rounded perfectly: where codes start."""
        f_hat, groups = torch.zeros_like(f), []
        for k in range(self.K):
            target = f - f_hat if self.config.residual else f
            groups.append(self.look_at(target, k))
            f_hat = f_hat + self.upsample(self.downsample(target, k), k)
        return groups


# -- Demo ------------------------------------------------------------------------------------------

def main():
    torch.manual_seed(0)
    images = torch.from_numpy(shapes.draw(range(512))[0]).permute(0, 3, 1, 2) / 127.5 - 1
    tokenizer, steps = MultiScaleVQVAE(TokenizerConfig(vocab_size=256, channels=32)), 340
    optimizer = torch.optim.AdamW(tokenizer.parameters(), lr=4e-3)
    for step in range(steps):                              # warm up, then a straight line to 0
        optimizer.param_groups[0]["lr"] = 4e-3 * min(1, step / 20) * (1 - step / steps)
        _, _, losses = tokenizer(images[torch.randint(len(images), (8,))])
        optimizer.zero_grad()
        (losses["reconstruction"] + 0.25 * losses["vq"]).backward()
        optimizer.step()
        tokenizer.quantizer.update()                       # codes learn without gradients
    tokenizer.eval()
    shown = images[:8]
    with torch.no_grad():
        f = tokenizer.encode(shown)
        tokens = tokenizer.quantize(f)
        rebuilt = tokenizer.pyramid(tokens)
        decoded = [tokenizer.decode(f_hat).clamp(-1, 1) for f_hat in rebuilt]
    left = [float((f - f_hat).square().mean() / f.square().mean()) for f_hat in rebuilt]
    print("scale   tokens   f missing   picture error")
    for side, error, image in zip(tokenizer.scales, left, decoded):
        wrong = float((image - shown).square().mean())
        print(f"{side}x{side}{side * side:>10}{error:>11.1%}{wrong:>14.4f}")
    assert all(fine < coarse for coarse, fine in zip(left, left[1:])), "every scale must help"
    *_, (_, _, running) = tokenizer._rounds(f)
    assert torch.allclose(tokenizer.features(tokens), running), "Algorithm 2 undoes Algorithm 1"
    rows = (torch.cat([shown] + decoded) + 1) / 2
    plots.save_grid("out/02_multiscale_vqvae.png", rows, columns=8,
                       row_labels=["original"] + [f"{s}x{s}" for s in tokenizer.scales])
    print("wrote out/02_multiscale_vqvae.png (soft after so few steps; chapter 5 trains on)")


if __name__ == "__main__":
    main()
