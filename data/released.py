"""The released checkpoints: where they lie, what is in them, how their entries are called here."""
import re
from pathlib import Path

import torch

from data import BadInput
from data.plumbing import load_checkpoint

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


def imagenet_recipe(depth):
    """The original's schedule for a depth: epochs, batch, learning rate, weight decay."""
    batch = 1024 if depth >= 30 else 768
    epochs = 200 if depth < 20 else 250 if depth < 24 else 350
    return dict(batch_size=batch, steps=epochs * 1_281_167 // batch,
                lr=(8e-5 if depth >= 24 else 1e-4) * batch / 256,
                weight_decay=0.08 if depth >= 30 else 0.05,
                final_lr=0.01 if depth >= 24 else 0.1)


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


def unwrap(state, keys, what):
    """Training checkpoints of the original hold the weights some levels down. Raises BadInput for
    anything but names and tensors."""
    for key in keys:
        state = state.get(key, state) if isinstance(state, dict) else {}
    if not (isinstance(state, dict) and state and all(
            isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in state.items())):
        raise BadInput(f"not a released VAR {what}: it should hold names and tensors only")
    return state


def fetch(name, given=None):
    """A state dict: of the file `given`, or of `name`, downloaded once into data/downloads/."""
    path = Path(given) if given else Path(__file__).parent / "downloads" / name
    if not path.exists() and not given:
        path.parent.mkdir(parents=True, exist_ok=True)
        print(f"downloading {URL}{name} to {path}")
        try:
            torch.hub.download_url_to_file(URL + name, str(path))
        except Exception as error:
            raise BadInput(f"could not download {URL}{name} ({error}); give the files with "
                           "--tokenizer-file and --var-file") from None
    return load_checkpoint(path)
