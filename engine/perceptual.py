"""The two losses that VQGAN adds to the squared error.

The squared error forgives blur: where an edge may lie here or there, the average of both costs
least. The paper's tokenizer therefore minimises

    loss = L2 + vq + lambda_P * perceptual + lambda_G * weight * adversarial

  perceptual   LPIPS (Zhang et al. 2018, eq. 1): the squared distance between the features that a
               VGG-16 finds in the two images, after scaling those of each position to length 1
  adversarial  a PatchGAN (Isola et al. 2017) learns with the hinge loss to tell real patches from
               reconstructed ones, and the decoder learns to raise its scores. `weight` gives this
               term's gradient the length of the image loss's gradient (Esser et al. 2021, eq. 7)

Shapes: images (B, 3, H, W) in [-1, 1]; scores of the critic (B, 1, h, w), one per patch.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

from engine import BadInput
from engine.checkpoints import DOWNLOADS, download, load_checkpoint

# File in data/downloads/, its address, its sha256.
VGG = ("vgg16-397923af.pth", "https://download.pytorch.org/models/vgg16-397923af.pth",
       "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0")
LPIPS = ("lpips_vgg.pth",
         "https://github.com/richzhang/PerceptualSimilarity/raw/master/lpips/weights/v0.1/vgg.pth",
         "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868")
# Widths of the convolutions of VGG-16 before each pooling. LPIPS reads the last of every group.
GROUPS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class Perceptual(nn.Module):
    """LPIPS, version 0.1, on VGG-16. forward(x, y), both (B, 3, H, W) in [-1, 1] -> (B,).
    Sides must be at least 16 pixels, because VGG-16 halves them four times."""

    def __init__(self):
        super().__init__()
        layers, c_in = [], 3
        for k, group in enumerate(GROUPS):
            if k > 0:
                layers.append(nn.MaxPool2d(2))
            for c in group:
                layers += [nn.Conv2d(c_in, c, 3, padding=1), nn.ReLU()]
                c_in = c
        self.features = nn.Sequential(*layers)             # numbered as in torchvision
        self.weights = nn.ParameterList(torch.zeros(group[-1]) for group in GROUPS)
        # VGG was trained on images with this mean and spread, here for values in [-1, 1].
        self.register_buffer("mean", torch.tensor([-.030, -.088, -.188]).view(1, 3, 1, 1))
        self.register_buffer("spread", torch.tensor([.458, .448, .450]).view(1, 3, 1, 1))
        self.requires_grad_(False).eval()

    def unit_features(self, x):
        """x (B, 3, H, W) -> the features after each group, scaled to length 1 at each position"""
        found = []
        x = (x - self.mean) / self.spread
        for layer in self.features:
            if isinstance(layer, nn.MaxPool2d):            # a group ends before each pooling
                found.append(x)
            x = layer(x)
        found.append(x)
        return [x / (x.float().square().sum(1, keepdim=True).sqrt() + 1e-10) for x in found]

    def forward(self, x, y):
        """Equation 1: weighted squared differences, averaged over positions, summed over groups."""
        distance = 0
        for a, b, w in zip(self.unit_features(x), self.unit_features(y), self.weights):
            distance = distance + ((a - b).square() * w.view(1, -1, 1, 1)).sum(1).mean((1, 2))
        return distance


def load_perceptual():
    """LPIPS with its published weights, downloaded once. -> Perceptual. Raises BadInput if they are
    neither in data/downloads/ nor on the network."""
    state = {}
    for name, url, sha256 in (VGG, LPIPS):
        state |= load_checkpoint(download(url, DOWNLOADS / name, sha256))
    model = Perceptual()
    try:
        for name, weights in model.features.named_parameters(prefix="features"):
            weights.copy_(state[name])
        for k, weights in enumerate(model.weights):
            weights.copy_(state[f"lin{k}.model.1.weight"].view_as(weights))
    except Exception as error:
        raise BadInput(f"{DOWNLOADS} does not hold VGG-16 and LPIPS: {error}") from None
    return model


class Discriminator(nn.Module):
    """A PatchGAN: at most three convolutions of stride 2, so that each score sees one patch only.
    image (B, 3, H, W) -> scores (B, 1, h, w), high for real patches"""

    def __init__(self, image_size, width=64):
        super().__init__()
        layers, c = [nn.Conv2d(3, width, 4, 2, 1), nn.LeakyReLU(0.2)], width
        for _ in range(1 if image_size < 64 else 2):
            layers += [nn.Conv2d(c, 2 * c, 4, 2, 1, bias=False), nn.GroupNorm(8, 2 * c),
                       nn.LeakyReLU(0.2)]
            c = 2 * c
        self.net = nn.Sequential(*layers, nn.Conv2d(c, c, 3, 1, 1), nn.LeakyReLU(0.2),
                                 nn.Conv2d(c, 1, 3, 1, 1))

    def forward(self, image):
        return self.net(image)


def adversarial_losses(critic, image, decoded, image_loss, last_weight):
    """The generator's loss, weighted against `image_loss` at the decoder's last weights, and the
    critic's loss. The first has no gradient for the critic, the second none for the generator.
    image, decoded (B, 3, H, W) -> two losses ()"""
    critic.requires_grad_(False)
    generator_loss = -critic(decoded).float().mean()
    critic.requires_grad_(True)
    weight = adaptive_weight(image_loss, generator_loss, last_weight)
    real, fake = critic(torch.cat([image, decoded.detach()])).float().chunk(2)
    # The hinge loss: scores of real patches should exceed 1, others should be below -1.
    critic_loss = (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2
    return weight * generator_loss, critic_loss


def adaptive_weight(other, adversarial, weight):
    """How many times longer the gradient of the other losses is than that of the adversarial loss,
    at the decoder's last `weight` (Esser et al. 2021, eq. 7). -> (), a constant of at most 10,000:
    without create_graph no gradient flows through it."""
    # Exercise 05_3
    long = torch.autograd.grad(other, weight, retain_graph=True)[0]
    short = torch.autograd.grad(adversarial, weight, retain_graph=True)[0]
    return (long.norm() / (short.norm() + 1e-4)).clamp(max=1e4)


def start_late(progress, start=0.2, warm_up=0.2):
    """The share of the adversarial weight in use at this share of the training run: 0 until images
    are worth judging, then a slow rise, because the critic has to learn first."""
    return min(max(0.0, (progress - start) / warm_up), 1.0)
