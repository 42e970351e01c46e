"""The checkpoints released with the paper: where they are, and the names of their entries here."""
import re
from pathlib import Path

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

# Released name -> ours, in order. Levels count from fine to coarse there, in our decoder the way
# the data flows.
TOKENIZER_NAMES = [
    (r"^(encoder|decoder)\.mid\.block_1\.", r"\1.middle.0."),
    (r"^(encoder|decoder)\.mid\.attn_1\.", r"\1.middle.1."),
    (r"^(encoder|decoder)\.mid\.block_2\.", r"\1.middle.2."),
    (r"\.nin_shortcut\.", ".shortcut."),
    (r"\.proj_out\.", ".proj."),
    (r"^quantize\.quant_resi\.qresi_ls\.(\d+)\.", r"phis.\1."),
    (r"^quantize\.embedding\.weight$", "quantizer.codebook"),
]
TOKENIZER_SKIPPED = re.compile(r"^quantize\.ema_vocab_hit_SV$")      # statistics, not weights


def tokenizer_name(name, levels=5, blocks=2):
    """Name in the released state dict -> name in ours (None: a buffer we do not need)."""
    if TOKENIZER_SKIPPED.match(name):
        return None
    for pattern, ours in TOKENIZER_NAMES:
        name = re.sub(pattern, ours, name)
    found = re.match(r"^(encoder|decoder)\.(?:down|up)\.(\d+)\.(\w+?)\.(?:(\d+)\.)?(.*)$", name)
    if not found:
        return name
    side, i, part, j, rest = found.groups()
    i, n = int(i), blocks + (side == "decoder")
    lowest = i == levels - 1                               # the only level with attention
    step = 2 if lowest else 1
    if part in ("downsample", "upsample"):
        position = n * step
    else:
        position = int(j) * step + (part == "attn")
    return f"{side}.levels.{i if side == 'encoder' else levels - 1 - i}.{position}.{rest}"


def tokenizer_sizes(state, scales=None):
    """Fields of TokenizerConfig, read off the shapes; `scales` is what shapes cannot tell."""
    channels = state["encoder.conv_in.weight"].shape[0]
    levels = 1 + max(int(k.split(".")[2]) for k in state if k.startswith("encoder.down."))
    blocks = 1 + max(int(k.split(".")[4]) for k in state if k.startswith("encoder.down.0.block."))
    multipliers = tuple(state[f"encoder.down.{i}.block.0.conv1.weight"].shape[0] // channels
                        for i in range(levels))
    vocab_size, latent_dim = state["quantize.embedding.weight"].shape
    phis = sum(k.startswith("quantize.quant_resi.qresi_ls.") for k in state) // 2
    scales = tuple(scales or SCALES[680])
    return dict(TOKENIZER, image_size=scales[-1] * 2 ** (levels - 1), scales=scales, phis=phis,
                vocab_size=vocab_size, latent_dim=latent_dim, channels=channels, blocks=blocks,
                multipliers=multipliers)


VAR_NAMES = [
    (r"^pos_start$", "start"), (r"^pos_1LC$", "position"), (r"^word_embed\.", "word_embed."),
    (r"^class_emb\.", "class_embed."), (r"^lvl_embed\.", "scale_embed."),
    (r"^shared_ada_lin\.1\.", "shared_modulation."),
    (r"^head_nm\.ada_lin\.1\.", "head_modulation."),
    (r"\.attn\.mat_qkv\.", ".attention.qkv."), (r"\.attn\.scale_mul_1H11$", ".attention.log_scale"),
    (r"\.attn\.", ".attention."), (r"\.ffn\.fc1\.", ".mlp.0."), (r"\.ffn\.fc2\.", ".mlp.2."),
    (r"\.ada_lin\.1\.", ".modulation."), (r"\.ada_gss$", ".modulation_offset"),
]
VAR_SKIPPED = re.compile(r"^(lvl_1L|attn_bias_for_masking|blocks\.\d+\.attn\.zero_k_bias)$")


def var_name(name):
    """Name in the released state dict -> name in ours (None: a derived buffer)."""
    if VAR_SKIPPED.match(name):
        return None
    for pattern, ours in VAR_NAMES:
        name = re.sub(pattern, ours, name)
    return name


def var_sizes(state, scales, heads=None):
    """Fields of VARConfig, read off the shapes; `heads` only if nothing in the file tells them."""
    rows, width = state["class_emb.weight"].shape
    depth = 1 + max(int(k.split(".")[1]) for k in state if k.startswith("blocks."))
    temperature = state.get("blocks.0.attn.scale_mul_1H11")
    return dict(
        num_classes=rows - 1, scales=tuple(scales), vocab_size=state["head.weight"].shape[0],
        latent_dim=state["word_embed.weight"].shape[1], depth=depth, width=width,
        heads=temperature.shape[1] if temperature is not None else heads or depth,
        mlp_ratio=state["blocks.0.ffn.fc1.weight"].shape[0] / width,
        shared_adaln="shared_ada_lin.1.weight" in state, qk_norm=temperature is not None)


def read_tokenizer(state, scales=None):
    """A released tokenizer's state dict -> (fields of TokenizerConfig, state dict with our names).
    scales: sides of the token maps, which no shape reveals. Raises BadInput for other layouts."""
    state = unwrap(state, "tokenizer", "quantize.embedding.weight")
    try:
        return tokenizer_sizes(state, scales), renamed(state, tokenizer_name)
    except (KeyError, IndexError, ValueError, TypeError) as error:
        raise BadInput(f"not in the released layout: {error}") from None


def read_transformer(state, scales=None, heads=None):
    """A released transformer's state dict -> (fields of VARConfig, state dict with our names).
    scales and heads are needed where no shape reveals them. Raises BadInput for other layouts."""
    state = unwrap(state, "transformer", "pos_1LC")
    length = state["pos_1LC"].shape[1] if state["pos_1LC"].ndim == 3 else 0
    scales = tuple(scales or SCALES.get(length, ()))
    if sum(side * side for side in scales) != length:
        raise BadInput(f"the transformer has {length} positions, but the scales {scales} have "
                       f"{sum(side * side for side in scales)}: give those it was trained with")
    try:
        return var_sizes(state, scales, heads), renamed(state, var_name)
    except (KeyError, IndexError, ValueError, TypeError) as error:
        raise BadInput(f"not in the released layout: {error}") from None


def unwrap(state, what, entry):
    """The state dict inside a training checkpoint, without the prefixes that DDP and torch.compile
    add to its names. Raises BadInput unless it holds tensors only, `entry` among them."""
    for key in ("trainer", "vae_local", "var_wo_ddp", "state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(torch.is_tensor(v) for v in state.values()):
        raise BadInput(f"not a released VAR {what}: it should hold names and tensors only")
    state = {re.sub(r"^(module\.|_orig_mod\.)+", "", name): v for name, v in state.items()}
    if entry not in state:
        raise BadInput(f"not a released VAR {what}: it has no entry {entry!r}")
    return state


def renamed(state, rename):
    state = {rename(name): value.float() if value.is_floating_point() else value
             for name, value in state.items()}
    state.pop(None, None)                                  # derived buffers, which we compute
    return state


def fill(model, state):
    """Give a model its weights. Every name must be known and none missing, except the statistics
    that only training uses. -> the model, frozen and in eval mode. Raises BadInput"""
    own = model.state_dict()
    for name in ("quantizer.hits", "quantizer.sums", "quantizer.initialised"):
        if name in own:
            state.setdefault(name, own[name])
    try:
        model.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise BadInput(f"not in the released layout: {' '.join(str(error).split())[:250]}") from None
    return model.eval().requires_grad_(False)


def fetch(name, given=""):
    """The state dict in the file `given`, or in `name`, downloaded once into data/downloads/."""
    if given:
        return load_checkpoint(Path(given))
    path = DOWNLOADS / name
    if not path.exists():
        download(URL + name, path)
    try:
        return load_checkpoint(path)
    except BadInput as error:
        raise BadInput(f"{error}; remove it to download it again, or give --tokenizer-file and "
                       "--var-file") from None
