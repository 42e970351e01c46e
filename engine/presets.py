"""Presets: what a data set, or --preset, changes in the default settings."""
import os
from pathlib import Path

from engine import BadInput, released

# Sizes of the models that are options of the command line; --set reaches the others.
TOKENIZER_OPTIONS = {"image_size": "side of the square images, in pixels",
                     "vocab_size": "codes of the tokenizer",
                     "quantizer": "how features become codes, by a name in QUANTIZERS of 01_vq.py"}
TRANSFORMER_OPTIONS = {"depth": "blocks of the transformer; for imagenet it sets all else"}
# Side of the images -> how the tokenizer makes them small, and the sides of its token maps.
LAYOUTS = {
    32: dict(unshuffle=4, scales=(1, 2, 3, 4, 6, 8), multipliers=(1,)),
    64: dict(unshuffle=4, scales=(1, 2, 3, 4, 6, 8), multipliers=(1, 2)),
    128: dict(unshuffle=4, scales=(1, 2, 3, 4, 6, 8, 11, 16), multipliers=(1, 2)),
    256: dict(unshuffle=4, scales=released.SCALES[680], multipliers=(1, 2, 2)),
    512: dict(unshuffle=4, scales=released.SCALES[2240], multipliers=(1, 2, 2)),
}
# The released tokenizer makes a token of 16x16 pixels at every image size.
RELEASED_LAYOUTS = {64: dict(scales=(1, 2, 3, 4)), 128: dict(scales=(1, 2, 3, 4, 6, 8)),
                    256: dict(scales=released.SCALES[680]), 512: dict(scales=released.SCALES[2240])}
# What a data set changes in the defaults. A preset may have layouts of its own, and a recipe: a
# function that gives more settings for a depth of the transformer. side_power=0: the paper's loss,
# and that of the CIFAR-10 model that comes with the code.
PRESETS = {
    # Guidance moves samples away from the data: the less, the smaller the Frechet distance here.
    "shapes": dict(image_size=32, depth=4, width=128, heads=4, drop_path=0.0, cfg=0.5),
    # Meant for about ten minutes on one H100, not measured: 64 epochs of stage 1, and ten of stage
    # 2 over 16 views (mirrored and shifted versions) of every image.
    "cifar10": dict(dataset="cifar10", image_size=32, vocab_size=1024, channels=96, flip=True,
                    views=16, adversarial=0.2, tokenizer_steps=25_000, tokenizer_batch_size=128,
                    depth=6, width=256, heads=4, shared_adaln=True, drop_path=0.1, steps=30_000,
                    batch_size=256, cfg=2.0, top_p=0.9, held_out=10_000, log_every=200,
                    save_every=1000),
    "cifar10-cpu": dict(dataset="cifar10", classes=("automobile", "horse", "ship"), image_size=32,
                        vocab_size=512, channels=64, flip=True, views=4, adversarial=0.2,
                        tokenizer_steps=12_000, tokenizer_batch_size=16, depth=6, width=192,
                        heads=3, shared_adaln=True, drop_path=0.05, steps=14_000, batch_size=24,
                        side_power=0.0, cfg=3.0, top_p=0.8, log_every=200),
    "folder": dict(image_size=64, vocab_size=1024, views=4, tokenizer_steps=20_000,
                   steps=30_000, tokenizer_batch_size=32, batch_size=64, depth=8, width=384,
                   heads=6),
    "imagenet": dict(released.TOKENIZER, layouts=RELEASED_LAYOUTS, recipe=released.imagenet_recipe,
                     dataset="imagenet", num_classes=1000, learn="ema", views=8,
                     tokenizer_steps=250_000, tokenizer_batch_size=256, tokenizer_lr=1e-4,
                     perceptual=1.0, adversarial=0.5, optimizer="adamw", depth=16, save_every=1000,
                     side_power=0.0, cfg=1.5, top_k=900, top_p=0.96),
}


def fill_in(typed):
    """{setting: typed value} -> the same, filled in. Of several values for a setting the first of
    these wins: typed, layout of the image size, recipe of the depth, preset, default."""
    if "num_classes" in typed:
        raise BadInput("num_classes is known from the data and cannot be set")
    name = typed.get("preset") or typed.get("dataset", "shapes")
    if "preset" in typed and name not in PRESETS:
        raise BadInput(f"no preset {name!r}: use {', '.join(PRESETS)}")
    preset = PRESETS.get(name, PRESETS["folder"])
    if typed.get("tokenizer_file"):                        # the released one, unless it is ours
        preset = {**preset, **released.TOKENIZER, "layouts": RELEASED_LAYOUTS}
    recipe = preset.get("recipe", lambda depth: {})(typed.get("depth", preset["depth"]))
    values = {**preset, **recipe, **typed}
    layouts = preset.get("layouts", LAYOUTS)
    values = {**values, **layouts.get(values["image_size"], {}), **typed}
    for name_typed, rule in (("steps", "epochs"), ("lr", "lr_per_256"),
                             ("weight_decay", "final_weight_decay")):
        if name_typed in typed:                            # it replaces the rule of the recipe
            values[rule] = typed.get(rule)
    values["out"] = typed.get("out") or os.path.join("out", Path(name).resolve().name)
    return values
