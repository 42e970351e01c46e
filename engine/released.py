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

# Released name -> ours, in order. Levels count from fine to coarse there; in our decoder they
# follow the data.
TOKENIZER_NAMES = [
    (r"^(encoder|decoder)\.mid\.block_1\.", r"\1.middle.0."),
    (r"^(encoder|decoder)\.mid\.attn_1\.", r"\1.middle.1."),
    (r"^(encoder|decoder)\.mid\.block_2\.", r"\1.middle.2."),
    (r"\.nin_shortcut\.", ".shortcut."),
    (r"\.proj_out\.", ".proj."),
    (r"^quantize\.quant_resi\.qresi_ls\.(\d+)\.", r"phis.\1."),
    (r"^quantize\.embedding\.weight$", "quantizer.codebook"),
]
VAR_NAMES = [
    (r"^pos_start$", "start"), (r"^pos_1LC$", "position"), (r"^word_embed\.", "word_embed."),
    (r"^class_emb\.", "class_embed."), (r"^lvl_embed\.", "scale_embed."),
    (r"^shared_ada_lin\.1\.", "shared_modulation."),
    (r"^head_nm\.ada_lin\.1\.", "head_modulation."),
    (r"\.attn\.mat_qkv\.", ".attention.qkv."), (r"\.attn\.scale_mul_1H11$", ".attention.log_scale"),
    (r"\.attn\.", ".attention."), (r"\.ffn\.fc1\.", ".mlp.0."), (r"\.ffn\.fc2\.", ".mlp.2."),
    (r"\.ada_lin\.1\.", ".modulation."), (r"\.ada_gss$", ".modulation_offset"),
]
# Statistics and buffers that are not weights.
SKIPPED = re.compile(r"^(quantize\.ema_vocab_hit_SV|lvl_1L|attn_bias_for_masking|"
                     r"blocks\.\d+\.attn\.zero_k_bias)$")


def renamed(state, names):
    """A released state dict with our names, in float32."""
    found = {}
    for name, value in state.items():
        if SKIPPED.match(name):
            continue
        for pattern, ours in names:
            name = re.sub(pattern, ours, name)
        found[name] = value.float() if value.is_floating_point() else value
    return found


def level_name(name, levels, blocks):
    """ "encoder.down.4.attn.1.x" -> "encoder.levels.4.3.x": a level is one sequence of layers here"""
    found = re.match(r"^(encoder|decoder)\.(?:down|up)\.(\d+)\.(\w+?)\.(?:(\d+)\.)?(.*)$", name)
    if not found:
        return name
    half, level, part, j, rest = found.groups()
    step = 2 if int(level) == levels - 1 else 1            # attention follows each block there
    if part in ("downsample", "upsample"):
        place = step * (blocks + (half == "decoder"))
    else:
        place = step * int(j) + (part == "attn")
    level = int(level) if half == "encoder" else levels - 1 - int(level)
    return f"{half}.levels.{level}.{place}.{rest}"


def read_tokenizer(state, scales=None):
    """A released tokenizer's state dict -> (fields of TokenizerConfig, state dict with our names).
    scales: sides of the token maps, which no shape reveals. Raises BadInput for other layouts."""
    state = unwrap(state, "tokenizer", "quantize.embedding.weight")
    scales = tuple(scales or SCALES[680])
    try:
        channels = state["encoder.conv_in.weight"].shape[0]
        levels = 1 + max(int(k.split(".")[2]) for k in state if k.startswith("encoder.down."))
        blocks = sum(bool(re.match(r"encoder\.down\.0\.block\.\d+\.conv1\.weight", k)) for k in state)
        widths = [len(state[f"encoder.down.{i}.block.0.conv1.weight"]) for i in range(levels)]
        vocab_size, latent_dim = state["quantize.embedding.weight"].shape
        sizes = dict(TOKENIZER, image_size=scales[-1] * 2 ** (levels - 1), scales=scales,
                     vocab_size=vocab_size, latent_dim=latent_dim, channels=channels, blocks=blocks,
                     multipliers=tuple(width // channels for width in widths),
                     phis=sum(k.startswith("quantize.quant_resi.qresi_ls.") for k in state) // 2)
    except (KeyError, IndexError, ValueError, TypeError) as error:
        raise BadInput(f"not a released VAR tokenizer: {error}") from None
    weights = renamed(state, TOKENIZER_NAMES)
    return sizes, {level_name(name, levels, blocks): value for name, value in weights.items()}


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
        rows, width = state["class_emb.weight"].shape
        depth = 1 + max(int(k.split(".")[1]) for k in state if k.startswith("blocks."))
        factor = state.get("blocks.0.attn.scale_mul_1H11")
        sizes = dict(num_classes=rows - 1, scales=scales, vocab_size=len(state["head.weight"]),
                     latent_dim=state["word_embed.weight"].shape[1], depth=depth, width=width,
                     heads=heads or depth if factor is None else factor.shape[1],
                     mlp_ratio=len(state["blocks.0.ffn.fc1.weight"]) / width,
                     shared_adaln="shared_ada_lin.1.weight" in state, qk_norm=factor is not None)
    except (KeyError, IndexError, ValueError, TypeError) as error:
        raise BadInput(f"not a released VAR transformer: {error}") from None
    return sizes, renamed(state, VAR_NAMES)


def unwrap(state, what, entry):
    """The state dict inside a training checkpoint, without the prefixes that DDP and torch.compile
    add to its names. Raises BadInput unless it holds tensors only, `entry` among them."""
    for key in ("trainer", "vae_local", "var_wo_ddp", "state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(name, str) and torch.is_tensor(value)
                                              for name, value in state.items()):
        raise BadInput(f"not a released VAR {what}: it should hold names and tensors only")
    state = {re.sub(r"^((module|_orig_mod)\.)+", "", name): v for name, v in state.items()}
    if entry not in state:
        raise BadInput(f"not a released VAR {what}: it has no entry {entry!r}")
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
    path = Path(given) if given else DOWNLOADS / name
    if not given and not path.exists():
        download(URL + name, path)
    return load_checkpoint(path)
