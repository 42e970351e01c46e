"""Chapter 4: predict the next scale.

A transformer reads what has been rebuilt so far and predicts the whole next token map at once:

    class -> [start] | f_hat_1 at 2x2 | f_hat_2 at 3x3 | ... | f_hat_5 at 8x8     L = 130 inputs
               |              |               |                     |
               v              v               v                     v
             r_1 1x1        r_2 2x2         r_3 3x3     ...       r_6 8x8          L softmaxes

    input = word_embed(f_hat, downsampled) + position + scale; the class steers each block (AdaLN)

Place k of this row holds f_hat_{k-1} and never r_k, so no token sees itself. The L softmaxes are
independent: the tokens of one map are drawn separately, given the coarser maps, which all see. In
training f_hat comes from real tokens, in sampling from drawn ones, mistakes included, which the
model has never seen (exposure bias). It has 6 steps to go wrong in, not 64.

Shapes: labels (B,) int64; teacher_inputs (B, L - first, C), first = scales[0]**2; logits (B, L, V);
D width; L tokens; V codes; C latent channels. Class `num_classes` is "no class" (guidance).

Sources: VAR (Tian et al. 2024), section 3 and appendix; adaptive layer norm from DiT (Peebles and
Xie 2023); query/key normalisation (Henry et al. 2020); drop-path (Huang et al. 2016).

Differs from the original VAR code: no monkeypatched caching flags, the cache is a plain list handed
to `step`; conditioning is computed once per image, not once per scale; with scales=(1,) * 64 the
same class is a raster next-token transformer, whose inputs embed one earlier token each.

    python 04_var_transformer.py     first loss = ln V, cached == masked, sizes of depth 16 to 30
"""
import math
from dataclasses import dataclass
from importlib import import_module
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from engine import BadInput
from report import plots

masking = import_module("03_block_causal_mask")


@dataclass
class VARConfig:
    """Every size of the transformer. One dial, `depth`, sets width and heads too."""
    num_classes: int = 10                        # from the data; one more row means "no class"
    scales: tuple = (1, 2, 3, 4, 6, 8)           # the tokenizer's
    vocab_size: int = 512                        # V, the tokenizer's
    latent_dim: int = 32                         # C, the tokenizer's
    depth: int = 16                              # blocks
    width: int = None                            # D; None means 64 * depth
    heads: int = None                            # None means depth
    mlp_ratio: float = 4.0                       # hidden width of the MLP over D
    shared_adaln: bool = False                   # one AdaLN for all blocks (released d36)
    qk_norm: bool = True                         # queries and keys of length 1, learnt factor
    label_dropout: float = 0.1                   # share of labels hidden in training, for guidance
    drop_path: float = None                      # of the last block; None means 0.1 * depth / 24

    def __post_init__(self):
        self.scales = tuple(self.scales)
        self.width = 64 * self.depth if self.width is None else self.width
        self.heads = self.depth if self.heads is None else self.heads
        self.drop_path = 0.1 * self.depth / 24 if self.drop_path is None else self.drop_path
        if min(self.depth, self.width, self.heads, len(self.scales), *self.scales) < 1:
            raise BadInput("depth, width, heads and every scale must be 1 or more")
        if not (0 <= self.label_dropout <= 1 and 0 <= self.drop_path < 1):
            raise BadInput("label_dropout must lie in 0..1, drop_path in 0..1 and below 1")
        if int(self.mlp_ratio * self.width) < 1:
            raise BadInput(f"mlp_ratio {self.mlp_ratio} leaves the MLP no hidden unit")
        if self.width % self.heads:
            raise BadInput(f"width {self.width} must be a multiple of heads {self.heads}")


class Conditioning(NamedTuple):
    """All that depends on the class alone, computed once per image."""
    row: torch.Tensor                            # (B, 1, D), what the first map starts from
    blocks: list                                 # AdaLN of each block, (B, 1, 6, D)
    head: torch.Tensor                           # AdaLN of the head, (B, 1, 2, D)


class LinearOfBias(nn.Linear):
    """A linear layer whose bias comes with the input. (The layer is called, and its weight not read
    from outside, so that --shard can fetch the weight in time.)"""

    def forward(self, x, bias):
        return F.linear(x, self.weight, bias)


class SelfAttention(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.heads, self.scales, self.qk_norm = cfg.heads, cfg.scales, cfg.qk_norm
        self.qkv = LinearOfBias(cfg.width, 3 * cfg.width, bias=False)
        # There is no key bias b: it adds the same q.b to every score q.(k + b) of a query, and
        # softmax does not change when all scores grow by the same number.
        self.q_bias = nn.Parameter(torch.zeros(cfg.width))
        self.v_bias = nn.Parameter(torch.zeros(cfg.width))
        # Queries and keys can grow in training until softmax saturates. At length 1 their products
        # lie in -1..1, too flat to choose among L tokens, so each head learns a factor: 4 at
        # first, at most 100.
        if cfg.qk_norm:
            self.log_scale = nn.Parameter(torch.full((1, cfg.heads, 1, 1), math.log(4)))
        self.proj = nn.Linear(cfg.width, cfg.width)

    def project(self, x):
        """x (B, n, D) -> queries, keys, values (B, heads, n, d) and the factor on q.k"""
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = self.qkv(x, bias)                                      # (B, n, 3 D)
        qkv = qkv.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)                                      # (B, heads, n, d) each
        if not self.qk_norm:
            return q, k, v, 0.25 / math.sqrt(q.shape[-1])            # as the original then does
        head_factor = self.log_scale.clamp(max=math.log(100)).exp()
        q, k = F.normalize(q, dim=-1) * head_factor, F.normalize(k, dim=-1)
        return q.to(v.dtype), k.to(v.dtype), v, 1.0                  # autocast leaves float32 here

    def forward(self, x, mask=None, cache=None):                     # (B, n, D)
        q, k, v, qk_factor = self.project(x)
        if cache is None:
            y = masking.block_causal_attention(q, k, v, self.scales, mask, qk_factor)
        else:
            # All that is cached is coarser or of this map, so every query may look at all of it.
            y = masking.attention(q, *cache.append(k, v), qk_factor=qk_factor)
        return self.proj(y.transpose(1, 2).flatten(2))               # (B, n, D)


class KVCache:
    """Keys and values of the scales done so far, in memory set aside for all L tokens."""

    def __init__(self, length):
        self.length, self.filled, self.k, self.v = length, 0, None, None

    def append(self, k, v):                                          # (B, heads, n, d) each
        if self.k is None:
            shape = (*k.shape[:2], self.length, k.shape[3])
            self.k, self.v = k.new_empty(shape), v.new_empty(shape)
        # Exercise 04_1
        end = self.filled + k.shape[2]
        assert end <= self.length, "the cache holds one batch: make a new one for the next"
        self.k[:, :, self.filled:end], self.v[:, :, self.filled:end] = k, v
        self.filled = end
        return self.k[:, :, :end], self.v[:, :, :end]

    def keep_first(self, count):
        """Of the first images alone."""
        self.k, self.v = self.k[:count], self.v[:count]


class Block(nn.Module):
    """Attention and MLP. The class speaks to both: it scales and shifts what enters (AdaLN), and
    gates what each branch adds to x. So it reaches every token in every block by itself, where one
    more token to look at could be overlooked."""

    def __init__(self, cfg, drop_rate):
        super().__init__()
        D, hidden = cfg.width, int(cfg.mlp_ratio * cfg.width)
        self.drop_rate = drop_rate
        self.norm = nn.LayerNorm(D, eps=1e-6, elementwise_affine=False)
        self.attention = SelfAttention(cfg)
        self.mlp = nn.Sequential(nn.Linear(D, hidden), nn.GELU(approximate="tanh"),
                                 nn.Linear(hidden, D))
        if cfg.shared_adaln:
            self.modulation_offset = nn.Parameter(torch.zeros(1, 1, 6, D))
        else:
            self.modulation = nn.Linear(D, 6 * D)

    def forward(self, x, adaln, mask=None, cache=None):              # x (B, n, D)
        gate1, gate2, scale_by1, scale_by2, shift1, shift2 = adaln.unbind(2)       # (B, 1, D) each
        # Exercise 04_2
        h = self.attention(self.norm(x) * (1 + scale_by1) + shift1, mask, cache)   # (B, n, D)
        x = x + self.drop_path(h * gate1)                                          # (B, n, D)
        h = self.mlp(self.norm(x) * (1 + scale_by2) + shift2)                      # (B, n, D)
        return x + self.drop_path(h * gate2)                                       # (B, n, D)

    def drop_path(self, h):
        """In training, leave this branch out for a random share of the images."""
        if not self.training or self.drop_rate == 0:
            return h
        keep = torch.rand(len(h), 1, 1, device=h.device) >= self.drop_rate
        return h * keep / (1 - self.drop_rate)


class VAR(nn.Module):
    """The next-scale predictor: stage 2 of VAR."""

    activation_checkpointing = False     # True: keep what enters a block, compute the rest again

    def __init__(self, config):
        super().__init__()
        self.config = cfg = config
        D, self.K, self.first = cfg.width, len(cfg.scales), cfg.scales[0] ** 2
        self.L = sum(side * side for side in cfg.scales)
        # 1. What stands in a position: the start or a cell of f_hat, in which map, and where. The L
        # positions are learned; nothing says which of them are neighbours.
        self.class_embed = nn.Embedding(cfg.num_classes + 1, D)
        self.start = nn.Parameter(torch.empty(1, self.first, D))
        self.word_embed = nn.Linear(cfg.latent_dim, D)
        self.scale_embed = nn.Embedding(self.K, D)
        self.position = nn.Parameter(torch.empty(1, self.L, D))
        # 2. Who belongs to which map and may look at whom: no part of the checkpoint.
        self.register_buffer("scale_of_token", masking.scale_of_token(cfg.scales), persistent=False)
        self.register_buffer("mask", masking.block_causal_mask(cfg.scales), persistent=False)
        # 3. The blocks; drop-path grows linearly from none in the first.
        self.shared_modulation = nn.Linear(D, 6 * D) if cfg.shared_adaln else None
        rates = [cfg.drop_path * i / max(cfg.depth - 1, 1) for i in range(cfg.depth)]
        self.blocks = nn.ModuleList(Block(cfg, rate) for rate in rates)
        # 4. The head: a logit for each code (for 2^24 codes one would predict their bits instead).
        self.head_norm = nn.LayerNorm(D, eps=1e-6, elementwise_affine=False)
        self.head_modulation = nn.Linear(D, 2 * D)
        self.head = nn.Linear(D, cfg.vocab_size)
        self.initialise()

    @torch.no_grad()
    def initialise(self):
        """As in the original."""
        cfg, D = self.config, self.config.width
        # 1. Small weights everywhere, no biases.
        std = math.sqrt(1 / (3 * D))
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.trunc_normal_(module.weight, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.start, std=std)
        nn.init.trunc_normal_(self.position, std=std)
        # 2. 2 * depth branches are added up; divided by the root of that, their sum is as large at
        # any depth. Their gates are almost shut: every block starts as the identity, and a deep
        # stack trains from the first step.
        gate = 1e-3 if cfg.depth < 24 else 1e-4 if cfg.depth < 30 else 1e-5
        gate = 5e-6 if cfg.depth >= 36 else gate
        for block in self.blocks:
            block.attention.proj.weight.div_(math.sqrt(2 * cfg.depth))
            block.mlp[2].weight.div_(math.sqrt(2 * cfg.depth))
            if cfg.shared_adaln:
                nn.init.trunc_normal_(block.modulation_offset, std=1 / math.sqrt(D))
                block.modulation_offset[:, :, 2:].mul_(0.5)
                block.modulation_offset[:, :, :2].mul_(gate)
            else:
                block.modulation.weight[2 * D:].mul_(0.5)
                block.modulation.weight[:2 * D].mul_(gate)
        # 3. The head is close to zero, so that the first loss is ln V.
        self.head.weight.mul_(0.02)
        self.head_modulation.weight.mul_(0.5)

    def conditioning(self, labels):
        """labels (B,) -> Conditioning"""
        row = self.class_embed(labels)[:, None]                      # (B, 1, D)
        c = F.silu(row)
        if self.config.shared_adaln:
            shared = self.shared_modulation(c).unflatten(2, (6, -1))
            blocks = [shared + block.modulation_offset for block in self.blocks]
        else:
            blocks = [block.modulation(c).unflatten(2, (6, -1)) for block in self.blocks]
        return Conditioning(row, blocks, self.head_modulation(c).unflatten(2, (2, -1)))

    def predict(self, x, conditioning):                              # (B, n, D) -> (B, n, V)
        scale_by, shift = conditioning.head.unbind(2)                # (B, 1, D) each
        return self.head(self.head_norm(x) * (1 + scale_by) + shift)

    def forward(self, labels, teacher_inputs):
        """labels (B,), teacher_inputs (B, L - first, C) -> logits (B, L, V).
        In training a share `label_dropout` of the labels becomes "no class"; never in eval."""
        if self.training and self.config.label_dropout > 0:
            hidden = torch.rand(len(labels), device=labels.device) < self.config.label_dropout
            labels = torch.where(hidden, self.config.num_classes, labels)
        conditioning = self.conditioning(labels)
        start = conditioning.row + self.start                             # (B, first, D)
        x = torch.cat([start, self.word_embed(teacher_inputs)], 1)        # (B, L, D)
        x = x + self.scale_embed(self.scale_of_token) + self.position     # (B, L, D)
        for block, adaln in zip(self.blocks, conditioning.blocks):
            if self.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, adaln, self.mask, use_reentrant=False)
            else:
                x = block(x, adaln, self.mask)                            # (B, L, D)
        return self.predict(x, conditioning)                              # (B, L, V)

    def new_cache(self):
        """An empty cache for one batch of images."""
        return [KVCache(self.L) for _ in self.blocks]

    def step(self, k, inputs, conditioning, cache):
        """Scale k alone, given the scales before it in `cache` (which grows).
        inputs (B, h_k*w_k, C), None at k = 0 -> logits (B, h_k*w_k, V)"""
        # Exercise 04_3
        begin = sum(side * side for side in self.config.scales[:k])
        end = begin + self.config.scales[k] ** 2
        x = conditioning.row + self.start if k == 0 else self.word_embed(inputs)
        x = x + self.scale_embed.weight[k] + self.position[:, begin:end]  # (B, h_k*w_k, D)
        for block, adaln, block_cache in zip(self.blocks, conditioning.blocks, cache):
            x = block(x, adaln, cache=block_cache)
        return self.predict(x, conditioning)                              # (B, h_k*w_k, V)

    def keep_first(self, count, conditioning, cache):
        """Continue with the first images of a batch alone: sampling drops the second half when no
        later scale is guided. Changes the cache -> Conditioning"""
        for block_cache in cache:
            block_cache.keep_first(count)
        row, blocks, head = conditioning
        return Conditioning(row[:count], [adaln[:count] for adaln in blocks], head[:count])


# -- Demo ------------------------------------------------------------------------------------------

def show_influence(var):
    """How far does each output move when one input is changed? The mask, measured from outside."""
    labels = torch.zeros(var.L + 1, dtype=torch.long)
    inputs = torch.randn(1, var.L - 1, var.config.latent_dim).repeat(var.L + 1, 1, 1)
    labels[0] = 1                                          # the first input is the class
    inputs[1:-1] += torch.eye(var.L - 1)[:, :, None]       # in the last row nothing is changed
    logits = var(labels, inputs)
    moved = (logits[:-1] - logits[-1]).norm(dim=-1).t()    # (L outputs, L inputs)
    assert not moved[~var.mask].any()
    print("changing an input moves no output of a coarser scale")
    text = ("Row: an output. Column: the input that was changed. Bright: it moves far.\n"
            "First column: the class, which steers every block. Diagonal: f_hat at the\n"
            "output's own place, which reaches it along the residual connections.")
    plots.save_grid("out/04_var_transformer.png", plots.heat_map((moved + 0.01).log())[None], 1,
                    scale=4, column_labels=["random weights; maps of 1, 4, 9, 16, 36, 64 tokens"],
                    footer=plots.legend(text))
    print("wrote out/04_var_transformer.png")


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
    show_influence(var)
    for depth in (16, 20, 24, 30):
        with torch.device("meta"):                         # sizes without memory
            big = VAR(VARConfig(num_classes=1000, scales=(1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
                                vocab_size=4096, latent_dim=32, depth=depth))
        print(f"depth {depth}: {sum(p.numel() for p in big.parameters()) / 1e6:.0f} M parameters")


if __name__ == "__main__":
    main()
