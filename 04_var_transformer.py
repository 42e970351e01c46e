"""Chapter 4: predict the next scale.

A transformer reads what has been rebuilt so far and predicts the whole next token map at once:

    class -> [start] | f_hat_1 at 2x2 | f_hat_2 at 3x3 | ... | f_hat_5 at 8x8     L = 130 inputs
               |              |               |                     |
               v              v               v                     v
             r_1 1x1        r_2 2x2         r_3 3x3     ...       r_6 8x8          L softmaxes

    input = word_embed(f_hat, downsampled) + position + scale; the class steers each block (AdaLN)

Shapes: labels (B,) int64; teacher_inputs (B, L - first, C), first = scales[0]**2; logits (B, L, V);
D width; L tokens; V codes; C latent channels. Class `num_classes` is "no class" (guidance).

Sources: VAR (Tian et al. 2024), section 3 and appendix; adaptive layer norm from DiT (Peebles and
Xie 2023); query/key normalisation (Henry et al. 2020); drop-path (Huang et al. 2016).

Differs from the original VAR code: no monkeypatched caching flags, the cache is a plain list handed
to `step`; conditioning is computed once per picture, not once per scale; a raster next-token model
is this class with scales=(1,) * 64.

    python 04_var_transformer.py     first loss = ln V, cached == masked, sizes of depth 16 to 30
"""
import functools
import math
from dataclasses import dataclass
from importlib import import_module

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from engine import BadInput
from report import plots

mask = import_module("03_block_causal_mask")


@dataclass
class VARConfig:
    """Every size of the transformer. One dial, `depth`, sets width and heads too."""
    num_classes: int = 10                        # from the data; one more row means "no class"
    scales: tuple = (1, 2, 3, 4, 6, 8)           # the tokenizer's
    vocab_size: int = 512                        # V, the tokenizer's
    latent_dim: int = 32                         # C, the tokenizer's
    depth: int = 16                              # blocks
    width: int = 0                               # D; 0 means 64 * depth
    heads: int = 0                               # 0 means depth
    mlp_ratio: float = 4.0                       # hidden width of the MLP over D
    shared_adaln: bool = False                   # one AdaLN for all blocks (released d36)
    qk_norm: bool = True                         # queries and keys of length 1, learnt temperature
    label_dropout: float = 0.1                   # share of labels hidden in training, for guidance
    drop_path: float = -1.0                      # of the last block; -1 means 0.1 * depth / 24

    def __post_init__(self):
        self.scales = tuple(self.scales)
        if self.depth < 1 or not self.scales or min(self.scales) < 1:
            raise BadInput("depth and every scale must be 1 or more")
        self.width = self.width or 64 * self.depth
        self.heads = self.heads or self.depth
        self.drop_path = 0.1 * self.depth / 24 if self.drop_path < 0 else self.drop_path
        if not (0 <= self.label_dropout <= 1 and self.drop_path < 1):
            raise BadInput("label_dropout must lie in 0..1 and drop_path below 1")
        if int(self.mlp_ratio * self.width) < 1:
            raise BadInput(f"mlp_ratio {self.mlp_ratio} leaves the MLP no hidden unit")
        if self.width % self.heads:
            raise BadInput(f"width {self.width} must be a multiple of heads {self.heads}")


class LinearOfBias(nn.Linear):
    """A linear layer whose bias comes with the input. (Calling a layer, instead of reading its
    weight, is what lets --shard fetch that weight in time.)"""

    def forward(self, x, bias):
        return F.linear(x, self.weight, bias)


class SelfAttention(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.heads, self.scales, self.qk_norm = cfg.heads, cfg.scales, cfg.qk_norm
        head_dim = cfg.width // cfg.heads
        self.qkv = LinearOfBias(cfg.width, 3 * cfg.width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(cfg.width))           # a key bias would cancel in
        self.v_bias = nn.Parameter(torch.zeros(cfg.width))           # the softmax: there is none
        if cfg.qk_norm:
            self.log_scale = nn.Parameter(torch.full((1, cfg.heads, 1, 1), math.log(4)))
        else:
            self.plain_scale = 0.25 / math.sqrt(head_dim)            # the released choice
        self.proj = nn.Linear(cfg.width, cfg.width)

    def project(self, x):
        """x (B, n, D) -> queries, keys, values (B, heads, n, d) and the scale of their products"""
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = self.qkv(x, bias)                                      # (B, n, 3 D)
        qkv = qkv.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)                                      # each (B, heads, n, d)
        if not self.qk_norm:
            return q, k, v, self.plain_scale
        temperature = self.log_scale.clamp(max=math.log(100)).exp()
        q, k = F.normalize(q, dim=-1) * temperature, F.normalize(k, dim=-1)
        return q.to(v.dtype), k.to(v.dtype), v, 1.0                  # autocast leaves float32 here

    def forward(self, x, cache=None):                                # (B, n, D)
        q, k, v, scale = self.project(x)
        if cache is None:
            y = mask.block_causal_attention(q, k, v, self.scales, qk_factor=scale)
        else:                                                        # everything cached is coarser
            k, v = cache.append(k, v)                                # or in this block: no mask
            y = F.scaled_dot_product_attention(q, k, v, scale=scale)
        return self.proj(y.transpose(1, 2).flatten(2))               # (B, n, D)


class KVCache:
    """Keys and values of the scales done so far, in memory set aside for all L tokens."""

    def __init__(self, length):
        self.length, self.filled, self.k, self.v = length, 0, None, None

    def append(self, k, v):                                          # (B, heads, n, d) each
        if self.k is None:
            shape = (*k.shape[:2], self.length, k.shape[3])
            self.k, self.v = k.new_empty(shape), v.new_empty(shape)
        end = self.filled + k.shape[2]
        assert end <= self.length, "the cache holds one picture: make a new one for the next"
        self.k[:, :, self.filled:end], self.v[:, :, self.filled:end] = k, v
        self.filled = end
        return self.k[:, :, :end], self.v[:, :, :end]


class Block(nn.Module):
    """Attention and MLP, each between a modulated norm and a gate that the class opens."""

    def __init__(self, cfg, drop_path):
        super().__init__()
        D = cfg.width
        self.drop_path = drop_path
        self.norm = nn.LayerNorm(D, eps=1e-6, elementwise_affine=False)
        self.attention = SelfAttention(cfg)
        self.mlp = nn.Sequential(nn.Linear(D, int(cfg.mlp_ratio * D)), nn.GELU(approximate="tanh"),
                                 nn.Linear(int(cfg.mlp_ratio * D), D))
        if cfg.shared_adaln:
            self.modulation_offset = nn.Parameter(torch.zeros(1, 1, 6, D))
        else:
            self.modulation = nn.Linear(D, 6 * D)

    def forward(self, x, modulation, cache=None):                    # x (B, n, D)
        gamma1, gamma2, scale1, scale2, shift1, shift2 = modulation.unbind(2)    # (B, 1, D) each
        h = self.attention(self.norm(x) * (1 + scale1) + shift1, cache)          # (B, n, D)
        x = x + self.skip(h * gamma1)
        h = self.mlp(self.norm(x) * (1 + scale2) + shift2)                       # (B, n, D)
        return x + self.skip(h * gamma2)

    def skip(self, h):
        """Drop-path: in training, leave this branch out for a random share of the pictures."""
        if not self.training or self.drop_path == 0:
            return h
        keep = torch.rand(len(h), 1, 1, device=h.device) >= self.drop_path
        return h * keep / (1 - self.drop_path)


def in_half_if_stored_so(method):
    """A large model may be sampled with half-precision weights of its linear layers: products are
    then taken in half precision, while what the blocks add up stays float32."""
    @functools.wraps(method)
    def call(self, *args):
        weight = self.head.weight
        if weight.dtype not in (torch.float16, torch.bfloat16):      # training chooses for itself
            return method(self, *args)
        with torch.autocast(weight.device.type, weight.dtype):
            return method(self, *args)
    return call


class VAR(nn.Module):
    """The next-scale predictor: stage 2 of VAR."""

    activation_checkpointing = False     # True: keep what enters a block, compute the rest again

    def __init__(self, config):
        super().__init__()
        self.config = cfg = config
        D, self.K, self.first = cfg.width, len(cfg.scales), cfg.scales[0] ** 2
        self.L = sum(s * s for s in cfg.scales)
        self.class_embed = nn.Embedding(cfg.num_classes + 1, D)
        self.start = nn.Parameter(torch.empty(1, self.first, D))
        self.word_embed = nn.Linear(cfg.latent_dim, D)
        self.scale_embed = nn.Embedding(self.K, D)
        self.position = nn.Parameter(torch.empty(1, self.L, D))
        self.register_buffer("scale_of_token", mask.scale_of_token(cfg.scales), persistent=False)
        self.shared_modulation = nn.Linear(D, 6 * D) if cfg.shared_adaln else None
        rates = [cfg.drop_path * i / max(cfg.depth - 1, 1) for i in range(cfg.depth)]
        self.blocks = nn.ModuleList(Block(cfg, rate) for rate in rates)
        self.head_norm = nn.LayerNorm(D, eps=1e-6, elementwise_affine=False)
        self.head_modulation = nn.Linear(D, 2 * D)
        self.head = nn.Linear(D, cfg.vocab_size)
        self.initialise()

    @torch.no_grad()
    def initialise(self):
        """As in the original: small everywhere, and gates almost shut, so that every block starts
        as the identity; the head starts near zero, so that the first loss is ln V."""
        cfg = self.config
        std = math.sqrt(1 / (3 * cfg.width))
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.trunc_normal_(module.weight, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.start, std=std)
        nn.init.trunc_normal_(self.position, std=std)
        gate = next(g for least, g in ((36, 5e-6), (30, 1e-5), (24, 1e-4), (0, 1e-3))
                    if cfg.depth >= least)
        for block in self.blocks:
            block.attention.proj.weight.div_(math.sqrt(2 * cfg.depth))
            block.mlp[2].weight.div_(math.sqrt(2 * cfg.depth))
            if cfg.shared_adaln:
                nn.init.trunc_normal_(block.modulation_offset, std=1 / math.sqrt(cfg.width))
                block.modulation_offset[:, :, 2:].mul_(0.5)
                block.modulation_offset[:, :, :2].mul_(gate)
            else:
                block.modulation.weight[2 * cfg.width:].mul_(0.5)
                block.modulation.weight[:2 * cfg.width].mul_(gate)
        self.head.weight.mul_(0.02)
        self.head_modulation.weight.mul_(0.5)

    @in_half_if_stored_so
    def conditioning(self, labels):
        """All that depends on the class alone, computed once per picture. labels (B,) ->
        (class row (B, 1, D), modulation of each block [(B, 1, 6, D)], of the head (B, 1, 2, D))"""
        row = self.class_embed(labels)[:, None]                      # (B, 1, D)
        c = F.silu(row)
        if self.config.shared_adaln:
            shared = self.shared_modulation(c).unflatten(2, (6, -1))
            blocks = [shared + block.modulation_offset for block in self.blocks]
        else:
            blocks = [block.modulation(c).unflatten(2, (6, -1)) for block in self.blocks]
        return row, blocks, self.head_modulation(c).unflatten(2, (2, -1))

    def predict(self, x, conditioning):                              # (B, n, D) -> (B, n, V)
        scale, shift = conditioning[2].unbind(2)
        return self.head(self.head_norm(x) * (1 + scale) + shift)

    @in_half_if_stored_so
    def forward(self, labels, teacher_inputs):
        """labels (B,), teacher_inputs (B, L - first, C) -> logits (B, L, V).
        In training a share `label_dropout` of the labels becomes "no class"; never in eval."""
        if self.training and self.config.label_dropout > 0:
            hidden = torch.rand(len(labels), device=labels.device) < self.config.label_dropout
            labels = torch.where(hidden, self.config.num_classes, labels)
        conditioning = self.conditioning(labels)
        start = conditioning[0] + self.start                         # (B, first, D)
        x = torch.cat([start, self.word_embed(teacher_inputs)], 1)   # (B, L, D)
        x = x + self.scale_embed(self.scale_of_token) + self.position
        for block, modulation in zip(self.blocks, conditioning[1]):
            if self.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, modulation, use_reentrant=False)
            else:
                x = block(x, modulation)                             # (B, L, D)
        return self.predict(x, conditioning)                         # (B, L, V)

    def new_cache(self):
        """An empty cache for one batch of pictures."""
        return [KVCache(self.L) for _ in self.blocks]

    @in_half_if_stored_so
    def step(self, k, inputs, conditioning, cache):
        """Scale k alone, given the scales before it in `cache` (which grows).
        inputs (B, h_k*w_k, C), None at k = 0 -> logits (B, h_k*w_k, V)"""
        begin = sum(s * s for s in self.config.scales[:k])
        end = begin + self.config.scales[k] ** 2
        x = conditioning[0] + self.start if k == 0 else self.word_embed(inputs)
        x = x + self.scale_embed.weight[k] + self.position[:, begin:end]
        for block, modulation, block_cache in zip(self.blocks, conditioning[1], cache):
            x = block(x, modulation, block_cache)
        return self.predict(x, conditioning)


# -- Demo ------------------------------------------------------------------------------------------

def influence(model):
    """Change one input at a time (the first is the class): how far does each output move?
    -> (L, L), row = output, column = input. Measured, not derived from the mask."""
    labels = torch.zeros(model.L + 1, dtype=torch.long)
    inputs = torch.randn(1, model.L - 1, model.config.latent_dim).repeat(model.L + 1, 1, 1)
    labels[0] = 1
    for i in range(1, model.L):
        inputs[i, i - 1] += 1
    logits = model(labels, inputs)                                   # the last row: nothing changed
    return (logits[:-1] - logits[-1]).norm(dim=-1).t()


def show_influence():
    """The block-causal mask, seen from outside."""
    maps = []
    for scales in ((1, 2, 3, 4), (1,) * 30):               # raster order is the same class
        small = VAR(VARConfig(depth=2, width=64, heads=2, scales=scales)).eval()
        for p in small.parameters():
            p.add_(0.1 * torch.randn_like(p))
        moved = influence(small)
        assert bool((moved[~mask.block_causal_mask(scales)] == 0).all())
        maps.append(plots.heat_map((moved + 1e-3).log().numpy()))
    print("changing an input moves no output of a coarser scale (raster: no earlier output)")
    plots.save_grid("out/04_var_transformer.png", np.stack(maps), columns=2, scale=9,
                       column_labels=["next scale: 1 4 9 16", "raster: 30 blocks of 1"])
    print("wrote out/04_var_transformer.png: row output, column input, bright: moves more")


@torch.no_grad()
def main():
    torch.manual_seed(0)
    var = VAR(VARConfig(depth=2, width=128, heads=2)).eval()
    labels, teacher_inputs = torch.tensor([3, 10]), torch.randn(2, var.L - 1, var.config.latent_dim)
    tokens = torch.randint(512, (2, var.L))
    logits = var(labels, teacher_inputs)
    loss = float(F.cross_entropy(logits.flatten(0, 1), tokens.flatten()))
    print(f"loss before training {loss:.3f}, ln V = {math.log(512):.3f}")
    assert abs(loss / math.log(512) - 1) < 0.02

    for p in var.parameters():                         # open the gates: shut ones prove nothing
        p.add_(0.1 * torch.randn_like(p))
    logits, cache = var(labels, teacher_inputs), var.new_cache()
    conditioning, parts, begin = var.conditioning(labels), [], 0
    for k, side in enumerate(var.config.scales):
        inputs = teacher_inputs[:, begin - 1:begin - 1 + side * side] if k else None
        parts.append(var.step(k, inputs, conditioning, cache))
        begin += side * side
    difference = float((torch.cat(parts, 1) - logits).abs().max() / logits.abs().max())
    print(f"scale by scale with a cache against all at once with a mask: {difference:.1e}")
    assert difference < 1e-5
    show_influence()
    for depth in (16, 20, 24, 30):
        with torch.device("meta"):                         # sizes without memory
            big = VAR(VARConfig(num_classes=1000, scales=(1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
                                vocab_size=4096, latent_dim=32, depth=depth))
        print(f"depth {depth}: {sum(p.numel() for p in big.parameters()) / 1e6:.0f} M parameters")


if __name__ == "__main__":
    main()
