"""The views of an image: stage 2 is trained on the tokens of the image and of versions of it.

View 0 is the image itself; of a file, its centre. Further views of a file are random crops. Of
images in memory every other view is mirrored, and those after the first two are shifted.
"""
import numpy as np
import torch
import torch.nn.functional as F

from data.batches import crop_batches, image_fingerprint, per_pass, to_float


class Views:
    """`count` views of each of these images, which the token cache reads in the order it likes."""

    def __init__(self, images, count, workers=0):
        self.images, self.count, self.workers = images, count, workers
        self.at_once = per_pass(images.shape[1])     # how many images to encode together

    def __len__(self):
        return len(self.images)

    def fingerprint(self):
        return image_fingerprint(self.images)

    def batches(self, jobs, to_device):
        """jobs: pairs of rows (B,) and numbers of views. -> for every pair, for each of its views,
        (B, 3, H, W) in [-1, 1]. A file is decoded once for all the views of a pair."""
        if isinstance(self.images, np.ndarray):
            for rows, views in jobs:
                image = to_float(to_device(torch.from_numpy(self.images[rows])))
                for view in views:
                    yield view_of(image, view, rows, len(self))
        else:
            crops_of = ([(int(i), [view - 1 for view in views]) for i in rows]
                        for rows, views in jobs)
            for crops in crop_batches(self.images, crops_of, self.workers):  # (B, views, H, W, 3)
                for crop in crops.unbind(1):
                    yield to_float(to_device(crop.contiguous()))


def view_of(image, view, rows, n):
    """Images in memory (B, 3, H, W), rows (B,) of the n of their data set, as this view shows them.
    A shifted image moves by its own number of pixels, at most a sixteenth of its side, and is
    reflected at the border. -> (B, 3, H, W)"""
    if view % 2:
        image = image.flip(3)
    reach, side = image.shape[-1] // 16, image.shape[-1]
    if view < 2 or not reach:
        return image
    # Drawn for all n, so that it does not matter which images are encoded together.
    by = np.random.default_rng(view).integers(0, 2 * reach + 1, (n, 2))[rows]
    down, right = torch.from_numpy(by).to(image.device).unbind(1)
    windows = F.pad(image, (reach,) * 4, "reflect").unfold(2, side, 1).unfold(3, side, 1)
    return windows[torch.arange(len(rows), device=image.device), :, down, right]
