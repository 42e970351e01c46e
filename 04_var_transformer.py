"""Chapter 4: predict the next scale.

A transformer reads what has been rebuilt so far and predicts the whole next map at once:

    class -> [start] | f_hat_1 at 2x2 | f_hat_2 at 3x3 | ... | f_hat_5 at 8x8   130 inputs
               |              |               |                     |
               v              v               v                     v
             r_1 1x1        r_2 2x2         r_3 3x3     ...       r_6 8x8     130 softmaxes

    input = word_embed(f_hat, resized) + position + scale; the class steers every block

The positions of map k hold f_hat_{k-1} and never r_k, so no token sees itself. In sampling,
f_hat is rebuilt from drawn tokens, including mistakes that training never shows (exposure
bias). This is a plain GPT-2-like transformer on purpose: only the order is new.

Shapes: labels (B,), the null class is `num_classes`; teacher_inputs (B, L - first, C) with
first = scales[0]**2; logits (B, L, V). D width; L tokens; V codes; C latent channels.
Sources: VAR (Tian et al. 2024), section 3; adaptive layer norm (AdaLN): DiT (Peebles and
Xie 2023); query/key normalisation: Henry et al. 2020; drop-path: Huang et al. 2016. Figure
4 of VAR draws r_k as inputs; the original code, like ours, uses f_hat_k.
Differs from the original code: the cache is an argument of `step`; conditioning is computed
once per image, not once per scale; scales=(1,) * 64 gives a raster-order transformer.

    python 04_var_transformer.py     first loss = ln V, cached == masked, model sizes
"""
import math
from dataclasses import dataclass
from importlib import import_module
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

masking = import_module("03_block_causal_mask")


@dataclass
class VARConfig:
    """Every size of the transformer. Raises ValueError if they do not fit together."""
    num_classes: int = 10                      # from the data; plus the null class: "none"
    scales: tuple = (1, 2, 3, 4, 6, 8)         # of the tokenizer
    vocab_size: int = 512                      # V, of the tokenizer
    latent_dim: int = 32                       # C, of the tokenizer
    depth: int = 16                            # number of blocks; sets width and heads, too
    width: int = None                          # D; None means 64 * depth
    heads: int = None                          # None means depth
    mlp_ratio: float = 4.0                     # hidden width of the MLP / D
    shared_adaln: bool = False                 # one AdaLN for all blocks (released d36)
    qk_norm: bool = True                       # unit queries and keys, learned factor
    label_dropout: float = 0.1                 # share of labels that training hides
    drop_path: float = None                    # of the last block; None: 0.1 * depth / 24

    def __post_init__(self):
        self.scales = tuple(self.scales)
        self.width = 64 * self.depth if self.width is None else self.width
        self.heads = self.depth if self.heads is None else self.heads
        self.drop_path = 0.1 * self.depth / 24 if self.drop_path is None else self.drop_path
        if min(self.depth, self.width, self.heads, len(self.scales), *self.scales) < 1:
            raise ValueError("depth, width, heads and every scale must be at least 1")
        if not (0 <= self.label_dropout <= 1 and 0 <= self.drop_path < 1):
            raise ValueError("label_dropout must be in [0, 1] and drop_path in [0, 1)")
        if self.width % self.heads:
            raise ValueError(f"width {self.width} must be a multiple of heads {self.heads}")


class SelfAttention(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.heads, self.qk_norm = cfg.heads, cfg.qk_norm
        self.qkv = nn.Linear(cfg.width, 3 * cfg.width, bias=False)
        # No key bias b, as in the original. Without normalisation it would do nothing: it
        # adds q.b to all scores q.(k + b) of a query, and softmax ignores a constant.
        self.q_bias = nn.Parameter(torch.zeros(cfg.width))
        self.v_bias = nn.Parameter(torch.zeros(cfg.width))
        # Queries and keys can grow until softmax saturates. At unit length, their products
        # lie in [-1, 1], too flat to choose among L tokens. So each head learns a factor.
        if cfg.qk_norm:
            self.log_scale = nn.Parameter(torch.full((1, cfg.heads, 1, 1), math.log(4)))
        self.proj = nn.Linear(cfg.width, cfg.width)

    def project(self, x):
        """x (B, n, D) -> queries, keys, values (B, heads, n, d) and the factor on q.k"""
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = F.linear(x, self.qkv.weight, bias)                       # (B, n, 3 D)
        qkv = qkv.unflatten(2, (3, self.heads, -1))                    # (B, n, 3, heads, d)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                           # (B, heads, n, d)
        if not self.qk_norm:
            return q, k, v, 0.25 / math.sqrt(q.shape[-1])              # as released models do
        factor = self.log_scale.clamp(max=math.log(100)).exp()         # (1, heads, 1, 1)
        q, k = F.normalize(q, dim=-1) * factor, F.normalize(k, dim=-1)
        return q.to(v.dtype), k.to(v.dtype), v, 1.0    # autocast leaves q and k in float32

    def forward(self, x, mask=None, cache=None):                       # (B, n, D)
        q, k, v, qk_factor = self.project(x)
        if cache is not None:          # it holds this map and coarser ones: nothing to mask
            k, v = cache.append(k, v)
        y = masking.attention(q, k, v, mask, qk_factor)                # (B, heads, n, d)
        return self.proj(y.transpose(1, 2).flatten(2))                 # (B, n, D)


class KVCache:
    """Keys and values of the scales so far, in memory reserved for all `length` tokens."""

    def __init__(self, length):
        self.length, self.filled, self.k, self.v = length, 0, None, None

    def append(self, k, v):
        """Keys and values of n more tokens, (B, heads, n, d) each -> those of all so far"""
        if self.k is None:
            shape = (*k.shape[:2], self.length, k.shape[3])
            self.k, self.v = k.new_empty(shape), v.new_empty(shape)
        # Exercise 04_1
        end = self.filled + k.shape[2]
        assert end <= self.length, "the cache is full: make a new one for each batch"
        self.k[:, :, self.filled:end], self.v[:, :, self.filled:end] = k, v
        self.filled = end
        return self.k[:, :, :end], self.v[:, :, :end]


class Block(nn.Module):
    """Attention, then an MLP, each added to x and steered by the class (AdaLN).
    VAR.conditioning() cuts Linear(SiLU(class row)) into six vectors of size D. In a branch,
    `stretch` and `shift` change the normalised input, and `gate` multiplies the output. The
    class thus reaches every token in every block; attention could ignore a class token."""

    def __init__(self, cfg, drop_rate):
        super().__init__()
        D, hidden = cfg.width, int(cfg.mlp_ratio * cfg.width)
        self.drop_rate = drop_rate
        self.norm = nn.LayerNorm(D, eps=1e-6, elementwise_affine=False)
        self.attention = SelfAttention(cfg)
        self.mlp = nn.Sequential(nn.Linear(D, hidden), nn.GELU("tanh"), nn.Linear(hidden, D))
        if cfg.shared_adaln:
            self.modulation_offset = nn.Parameter(torch.zeros(1, 1, 6, D))
        else:
            self.modulation = nn.Linear(D, 6 * D)

    def forward(self, x, adaln, mask=None, cache=None):    # x (B, n, D), adaln (B, 1, 6, D)
        gate1, gate2, stretch1, stretch2, shift1, shift2 = adaln.unbind(2)  # (B, 1, D) each
        # Exercise 04_2
        h = self.attention(self.norm(x) * (1 + stretch1) + shift1, mask, cache)
        x = x + self.drop_path(h * gate1)                                        # (B, n, D)
        h = self.mlp(self.norm(x) * (1 + stretch2) + shift2)                     # (B, n, D)
        return x + self.drop_path(h * gate2)                                     # (B, n, D)

    def drop_path(self, h):
        """In training, drop this branch for a random share of the images."""
        if not self.training or self.drop_rate == 0:
            return h
        keep = torch.rand(len(h), 1, 1, device=h.device) >= self.drop_rate
        return h * keep / (1 - self.drop_rate)


class Conditioning(NamedTuple):
    """Everything that depends on the class alone, computed once per image."""
    row: torch.Tensor                          # the class embedding, (B, 1, D)
    blocks: list                               # AdaLN vectors of each block, (B, 1, 6, D)
    head: torch.Tensor                         # AdaLN vectors of the head, (B, 1, 2, D)


class VAR(nn.Module):
    """The next-scale predictor: stage 2 of VAR."""

    activation_checkpointing = False           # True: less memory, more computation

    def __init__(self, config):
        super().__init__()
        self.config = cfg = config
        D, scales = cfg.width, cfg.scales
        self.K, self.first, self.L = len(scales), scales[0] ** 2, sum(s * s for s in scales)
        # 1. What a position holds (the start or a cell of f_hat), of which map, and where.
        # The L positions are learned: nothing tells the model which cells are neighbours.
        self.class_embed = nn.Embedding(cfg.num_classes + 1, D)
        self.start = nn.Parameter(torch.empty(1, self.first, D))
        self.word_embed = nn.Linear(cfg.latent_dim, D)
        self.scale_embed = nn.Embedding(self.K, D)
        self.position = nn.Parameter(torch.empty(1, self.L, D))
        # 2. The scale of each token (L,) and the mask (L, L): a checkpoint need not hold them.
        self.scale_of_token = nn.Buffer(masking.scale_of_token(scales), persistent=False)
        self.mask = nn.Buffer(masking.block_causal_mask(scales), persistent=False)
        # 3. The blocks. Drop-path grows linearly from 0 in the first block.
        self.shared_modulation = nn.Linear(D, 6 * D) if cfg.shared_adaln else None
        rates = [cfg.drop_path * i / max(cfg.depth - 1, 1) for i in range(cfg.depth)]
        self.blocks = nn.ModuleList(Block(cfg, rate) for rate in rates)
        # 4. The head: one logit for each code.
        self.head_norm = nn.LayerNorm(D, eps=1e-6, elementwise_affine=False)
        self.head_modulation = nn.Linear(D, 2 * D)
        self.head = nn.Linear(D, cfg.vocab_size)
        self.initialise()

    @torch.no_grad()
    def initialise(self):
        """The initial values of the original."""
        cfg, D = self.config, self.config.width
        # 1. Small weights everywhere, zero biases.
        std = math.sqrt(1 / (3 * D))
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.trunc_normal_(module.weight, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.start, std=std)
        nn.init.trunc_normal_(self.position, std=std)
        # 2. Dividing by sqrt(2 * depth) makes the size of the sum of all 2 * depth branches
        # independent of depth. Gates are almost shut: a block starts close to the identity.
        gates = {0: 1e-3, 24: 1e-4, 30: 1e-5, 36: 5e-6}                # from this depth on
        gate = min(value for depth, value in gates.items() if cfg.depth >= depth)
        for block in self.blocks:
            block.attention.proj.weight.div_(math.sqrt(2 * cfg.depth))
            block.mlp[2].weight.div_(math.sqrt(2 * cfg.depth))
            if cfg.shared_adaln:
                nn.init.trunc_normal_(block.modulation_offset, std=1 / math.sqrt(D))
                six = block.modulation_offset[0, 0]                        # (6, D)
            else:
                six = block.modulation.weight.unflatten(0, (6, D))         # (6, D, D)
            six[:2].mul_(gate)
            six[2:].mul_(0.5)
        # 3. The head is close to zero, so the first loss is ln V.
        self.head.weight.mul_(0.02)
        self.head_modulation.weight.mul_(0.5)

    def conditioning(self, labels):
        """labels (B,) -> Conditioning"""
        row = self.class_embed(labels)[:, None]                              # (B, 1, D)
        c = F.silu(row)                                                      # (B, 1, D)
        if self.config.shared_adaln:
            shared = self.shared_modulation(c).unflatten(2, (6, -1))         # (B, 1, 6, D)
            blocks = [shared + block.modulation_offset for block in self.blocks]
        else:
            blocks = [block.modulation(c).unflatten(2, (6, -1)) for block in self.blocks]
        return Conditioning(row, blocks, self.head_modulation(c).unflatten(2, (2, -1)))

    def predict(self, x, conditioning):
        """The head, steered by the class as well. x (B, n, D) -> logits (B, n, V)"""
        stretch, shift = conditioning.head.unbind(2)                        # (B, 1, D) each
        return self.head(self.head_norm(x) * (1 + stretch) + shift)

    def forward(self, labels, teacher_inputs):
        """labels (B,), teacher_inputs (B, L - first, C) -> logits (B, L, V). In training, a
        share `label_dropout` of the labels is replaced by the null class; in eval, none."""
        rate = self.config.label_dropout
        if self.training and rate > 0:
            hidden = torch.rand(len(labels), device=labels.device) < rate    # (B,)
            labels = torch.where(hidden, self.config.num_classes, labels)
        conditioning = self.conditioning(labels)
        start = conditioning.row + self.start                                # (B, first, D)
        x = torch.cat([start, self.word_embed(teacher_inputs)], 1)           # (B, L, D)
        x = x + self.scale_embed(self.scale_of_token) + self.position        # (B, L, D)
        for block, adaln in zip(self.blocks, conditioning.blocks):
            if self.activation_checkpointing:
                x = checkpoint(block, x, adaln, self.mask, use_reentrant=False)
            else:
                x = block(x, adaln, self.mask)                               # (B, L, D)
        return self.predict(x, conditioning)                                 # (B, L, V)

    def new_cache(self):
        """An empty cache for one batch of images: a KVCache for each block."""
        return [KVCache(self.L) for _ in self.blocks]

    def step(self, k, inputs, conditioning, cache):
        """Predict scale k alone, given the scales before it in `cache`, which grows.
        inputs (B, h_k*w_k, C), or None at k = 0 -> logits (B, h_k*w_k, V)"""
        # Exercise 04_3
        begin = sum(side * side for side in self.config.scales[:k])
        end = begin + self.config.scales[k] ** 2
        x = conditioning.row + self.start if k == 0 else self.word_embed(inputs)
        x = x + self.scale_embed.weight[k] + self.position[:, begin:end]  # (B, h_k*w_k, D)
        for block, adaln, block_cache in zip(self.blocks, conditioning.blocks, cache):
            x = block(x, adaln, cache=block_cache)                        # (B, h_k*w_k, D)
        return self.predict(x, conditioning)                              # (B, h_k*w_k, V)


# -- Demo ----------------------------------------------------------------------------------

def scale_by_scale(var, labels, teacher_inputs):
    """The logits of forward(), computed by step() with a cache. -> (B, L, V)"""
    conditioning, cache = var.conditioning(labels), var.new_cache()
    sizes = [side * side for side in var.config.scales]
    inputs = [None, *teacher_inputs.split(sizes[1:], dim=1)]
    logits = [var.step(k, inputs[k], conditioning, cache) for k in range(var.K)]
    return torch.cat(logits, dim=1)


def show_influence(var):
    """Measure the mask from outside: how far does each output move if one input changes?"""
    from report import plots
    # Copy i of the inputs changes input i (0: the class); the last copy changes nothing.
    labels = torch.zeros(var.L + 1, dtype=torch.long)
    labels[0] = 1
    inputs = torch.randn(1, var.L - 1, var.config.latent_dim).repeat(var.L + 1, 1, 1)
    inputs[1:-1] += torch.eye(var.L - 1)[:, :, None]
    logits = var(labels, inputs)                           # (L + 1, L, V)
    moved = (logits[:-1] - logits[-1]).norm(dim=-1).t()    # (L outputs, L inputs)
    assert not moved[~var.mask].any()
    print("changing an input moves no output of a coarser scale")
    picture = plots.heat_map((moved + 0.01).log())[None]   # (1, 3, L, L)
    plots.save_grid(
        "out/04_var_transformer.png", {"": picture}, scale=4,
        footer="Row: an output. Column: the input that was changed. Bright: it moves far.\n"
               "First column: the class, which steers every block. Diagonal: f_hat at the\n"
               "output's own position. Random weights; maps of 1, 4, 9, 16, 36, 64 tokens.")


@torch.no_grad()
def main():
    torch.manual_seed(0)
    var = VAR(VARConfig(depth=2, width=128, heads=2)).eval()
    labels, tokens = torch.tensor([3, 10]), torch.randint(512, (2, var.L))
    teacher_inputs = torch.randn(2, var.L - 1, var.config.latent_dim)
    logits = var(labels, teacher_inputs)                   # (2, L, V)
    loss = float(F.cross_entropy(logits.flatten(0, 1), tokens.flatten()))
    print(f"loss before training {loss:.3f}, ln V = {math.log(512):.3f}")
    assert abs(loss / math.log(512) - 1) < 0.02

    for p in var.parameters():                 # with gates near 0 the test would be trivial
        p.add_(0.1 * torch.randn_like(p))
    masked = var(labels, teacher_inputs)
    cached = scale_by_scale(var, labels, teacher_inputs)
    difference = float((cached - masked).abs().max() / masked.abs().max())
    print(f"scale by scale with a cache, against one pass with a mask: {difference:.1e}")
    assert difference < 1e-5
    show_influence(var)
    for depth in (16, 20, 24, 30):
        with torch.device("meta"):                         # sizes without memory
            big = VAR(VARConfig(num_classes=1000, scales=(1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
                                vocab_size=4096, latent_dim=32, depth=depth))
        parameters = sum(p.numel() for p in big.parameters())
        print(f"depth {depth}: {parameters / 1e6:.0f} M parameters")


if __name__ == "__main__":
    main()
