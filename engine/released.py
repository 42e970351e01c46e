"""The checkpoints released with the paper: where they are, and the names of their entries here."""
import re

import torch

from engine import BadInput
from engine.checkpoints import DOWNLOADS, download, load_checkpoint

URL = "https://huggingface.co/FoundationVision/var/resolve/main/"
# Number of tokens -> sides of the token maps, for 256 and for 512 pixels.
SCALES = {680: (1, 2, 3, 4, 5, 6, 8, 10, 13, 16), 2240: (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)}
# The tokenizer: 256 px, 16x down, 109 M parameters. Fields of TokenizerConfig.
TOKENIZER = dict(image_size=256, scales=SCALES[680], vocab_size=4096, latent_dim=32, channels=160,
                 multipliers=(1, 1, 2, 2, 4), blocks=2, unshuffle=1, groups=32, attention=True,
                 learn="gradient")
# Part of a released name -> ours, replaced in this order.
NAMES = {
    "mid.block_1.": "middle.0.", "mid.attn_1.": "middle.1.", "mid.block_2.": "middle.2.",
    "nin_shortcut": "shortcut", "proj_out": "proj",
    "quantize.quant_resi.qresi_ls.": "phis.", "quantize.embedding.weight": "quantizer.codebook",
    "pos_start": "start", "pos_1LC": "position",
    "class_emb.": "class_embed.", "lvl_embed": "scale_embed",
    "shared_ada_lin.1": "shared_modulation", "head_nm.ada_lin.1": "head_modulation",
    "ada_lin.1": "modulation", "ada_gss": "modulation_offset",
    "attn.mat_qkv": "attention.qkv", "attn.scale_mul_1H11": "attention.log_scale",
    "attn.": "attention.", "ffn.fc1": "mlp.0", "ffn.fc2": "mlp.2",
}
# Statistics and buffers that are not weights.
SKIPPED = ("ema_vocab_hit_SV", "lvl_1L", "attn_bias_for_masking", "attn.zero_k_bias")


def renamed(state):
    """A released state dict with our names, in float32."""
    found = {}
    for name, value in state.items():
        if not name.endswith(SKIPPED):
            for theirs, ours in NAMES.items():
                name = name.replace(theirs, ours)
            found[name] = value.float() if value.is_floating_point() else value
    return found


def level_name(name):
    """ "encoder.down.4.attn.1.x" -> "encoder.levels.4.3.x": a level is one sequence of layers
    here. Levels count from fine to coarse there; in our decoder they follow the data."""
    found = re.match(r"(\w+coder)\.(?:down|up)\.(\d+)\.([a-z]+)\.(?:(\d+)\.)?(.*)", name)
    if not found:
        return name
    half, level, part, j, rest = found.groups()
    level = int(level)
    blocks = 2 if half == "encoder" else 3           # downsample or upsample follows them
    step = 2 if level == 4 else 1                    # attention follows each block there
    place = step * int(j or blocks) + (part == "attn")
    level = level if half == "encoder" else 4 - level
    return f"{half}.levels.{level}.{place}.{rest}"


def read_tokenizer(state, scales=None):
    """A released tokenizer's state dict -> (fields of TokenizerConfig, state dict with our names).
    scales: sides of the token maps, which no shape reveals. Raises BadInput for other layouts."""
    state = unwrap(state, "quantize.embedding.weight", "encoder.conv_in.weight")
    scales = tuple(scales or SCALES[680])
    vocab_size, latent_dim = state["quantize.embedding.weight"].shape
    channels = len(state["encoder.conv_in.weight"])
    sizes = dict(TOKENIZER, image_size=16 * scales[-1], scales=scales,
                 vocab_size=vocab_size, latent_dim=latent_dim, channels=channels)
    return sizes, renamed({level_name(name): value for name, value in state.items()})


def read_transformer(state, scales=None, heads=None):
    """A released transformer's state dict -> (fields of VARConfig, state dict with our names).
    scales and heads are needed where no shape reveals them. Raises BadInput for other layouts."""
    state = unwrap(state, "pos_1LC")
    try:
        length = state["pos_1LC"].shape[1]
        scales = tuple(scales or SCALES.get(length, ()))
        rows, width = state["class_emb.weight"].shape
        depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
        factor = state.get("blocks.0.attn.scale_mul_1H11")
        sizes = dict(num_classes=rows - 1, scales=scales, vocab_size=len(state["head.weight"]),
                     latent_dim=state["word_embed.weight"].shape[1], depth=depth, width=width,
                     heads=heads or depth if factor is None else factor.shape[1],
                     mlp_ratio=len(state["blocks.0.ffn.fc1.weight"]) / width,
                     shared_adaln="shared_ada_lin.1.weight" in state, qk_norm=factor is not None)
    except Exception as error:
        raise BadInput(f"not a released VAR transformer: {error}") from None
    if sum(side * side for side in scales) != length:
        raise BadInput(f"the transformer has {length} positions, which do not fit the scales "
                       f"{scales}: give those it was trained with")
    return sizes, renamed(state)


def unwrap(state, *entries):
    """The state dict inside a training checkpoint, without the prefixes that DDP and
    torch.compile add to its names. Raises BadInput unless it holds tensors only, and these."""
    for key in ("trainer", "vae_local", "var_wo_ddp", "state_dict", "model"):
        if isinstance(state.get(key), dict):
            state = state[key]
    state = {re.sub(r"^((module|_orig_mod)\.)+", "", str(k)): v for k, v in state.items()}
    if not (state.keys() >= set(entries) and all(map(torch.is_tensor, state.values()))):
        raise BadInput("not a released model of VAR, which holds tensors only, among them "
                       f"{' and '.join(entries)}")
    return state


def fill(model, state):
    """Give a model its weights. Every name must be known and none missing, except the statistics
    that only training uses. -> the model, frozen and in eval mode. Raises BadInput"""
    codes = state.get("quantizer.codebook")
    if codes is not None:                 # the same values every time: a hash of them names a model
        state = state | {"quantizer.hits": codes.new_ones(len(codes)),
                         "quantizer.sums": codes.clone(),
                         "quantizer.initialised": torch.tensor(True)}
    try:
        model.load_state_dict(state, assign=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:250]
        raise BadInput(f"not in the released layout: {reason}") from None
    return model.eval().requires_grad_(False)


def fetch(name, given=""):
    """The state dict in the file `given`, or in `name`, downloaded once into data/downloads/."""
    return load_checkpoint(given or download(URL + name, DOWNLOADS / name))
