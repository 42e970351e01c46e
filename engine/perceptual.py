"""What VQGAN adds to the squared error: a loss on features, and a critic.

The squared error forgives blur: where an edge may lie here or there, the average of both costs
least. Two terms ask for more, as in the paper's

    loss = L2 + commitment + lambda_P * perceptual + lambda_G * adversarial

  perceptual   LPIPS (Zhang et al. 2018, eq. 1): squared distance between the features a VGG-16
               finds in both images, each position's features scaled to length 1 first
  adversarial  a PatchGAN (Isola et al. 2017) learns, by the hinge loss, to tell real patches from
               rebuilt ones; the decoder learns to please it. Its weight is set in every step so
               that its gradient is as long as that of the image loss (Esser et al. 2021, eq. 7)

Shapes: images (B, 3, H, W) in [-1, 1]; the critic's scores (B, 1, h, w), one per patch.
"""
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from engine import BadInput, files
from engine.checkpoints import load_checkpoint
from engine.devices import autocast

VGG = ("https://download.pytorch.org/models/vgg16-397923af.pth",
       "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0")
LPIPS = ("https://github.com/richzhang/PerceptualSimilarity/raw/master/lpips/weights/v0.1/vgg.pth",
         "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868")
# Convolutions of VGG-16 before each of its poolings; LPIPS looks at the last one of every group.
GROUPS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class Perceptual(nn.Module):
    """LPIPS, version 0.1, on VGG-16. forward(x, y), both (B, 3, H, W) in [-1, 1] -> (B,).

    The sides must be at least 16 pixels: VGG-16 halves them four times before its last features."""

    def __init__(self):
        super().__init__()
        layers, c_in = [], 3
        for k, group in enumerate(GROUPS):
            layers += [nn.MaxPool2d(2)] * (k > 0)
            for c in group:
                layers += [nn.Conv2d(c_in, c, 3, padding=1), nn.ReLU()]
                c_in = c
        self.features = nn.Sequential(*layers)             # numbered as torchvision's
        self.weights = nn.ParameterList(torch.zeros(group[-1]) for group in GROUPS)
        # What VGG was trained on: mean and spread of ImageNet's colours, for [-1, 1].
        self.register_buffer("mean", torch.tensor([-.030, -.088, -.188]).view(1, 3, 1, 1))
        self.register_buffer("spread", torch.tensor([.458, .448, .450]).view(1, 3, 1, 1))
        self.requires_grad_(False).eval()

    def load(self, vgg, lpips):
        """State dicts in torchvision's and LPIPS's layout. Raises BadInput if they do not fit."""
        try:
            self.features.load_state_dict({name.removeprefix("features."): value for name, value
                                           in vgg.items() if name.startswith("features.")})
            for k, weights in enumerate(self.weights):
                weights.copy_(lpips[f"lin{k}.model.1.weight"].view_as(weights))
        except (KeyError, RuntimeError, AttributeError) as error:
            reason = str(error).splitlines()[-1].strip()[:80]
            raise BadInput(f"these are not the weights of VGG-16 and of LPIPS ({reason})") from None
        return self

    def unit_features(self, x):
        """x (B, 3, H, W) -> features after each group, every position's scaled to length 1."""
        x, found = (x - self.mean) / self.spread, []
        for layer in self.features:
            if isinstance(layer, nn.MaxPool2d):            # the last layer of a group is behind us
                found.append(x)
            x = layer(x)
        return [x / (x.float().square().sum(1, keepdim=True).sqrt() + 1e-10)
                for x in (*found, x)]

    def forward(self, x, y):
        """Equation 1: weighted squared differences, averaged over positions, summed over groups."""
        return sum(((a - b).square() * w.view(1, -1, 1, 1)).sum(1).mean((1, 2))
                   for a, b, w in zip(self.unit_features(x), self.unit_features(y), self.weights))


def load_perceptual(vgg_file="", lpips_file=""):
    """The two files given, or those downloaded once into data/downloads/ and checked. -> Perceptual
    Raises BadInput if there is neither file nor network."""
    states = []
    for given, (url, checksum) in ((vgg_file, VGG), (lpips_file, LPIPS)):
        name = "lpips_" + Path(url).name if url == LPIPS[0] else Path(url).name
        path = Path(given) if given else files.DOWNLOADS / name
        if not given and not path.exists():
            try:
                files.download(url, path, checksum)
            except BadInput as error:
                raise BadInput(f"{error}; --perceptual 0 trains without the perceptual loss") \
                    from None
        states.append(load_checkpoint(path))
    # Its first weights are drawn. A resumed run must not draw where the first run did not.
    with torch.random.fork_rng(devices=[]):
        return Perceptual().load(*states)


class Discriminator(nn.Module):
    """A PatchGAN: three convolutions of stride 2 at most, so that every score sees a patch only.
    image (B, 3, H, W) -> scores (B, 1, h, w), high for real."""

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


class Critic:
    """A Discriminator in training beside the tokenizer. last: the last layer of the decoder"""

    def __init__(self, settings, processes, image_size, last, loss_scale):
        self.last, self.loss_scale, self.parts = last, loss_scale, settings.accumulate
        self.autocast = partial(autocast, processes.device, settings.precision)
        self.network = Discriminator(image_size).to(processes.device)
        self.model = processes.wrap(self.network, settings.compile)
        # Two more gradients end at the last layer. A compiled graph always computes all of its
        # gradients, so this layer stays outside.
        last.forward = torch.compiler.disable(last.forward)
        self.optimizer = torch.optim.AdamW(self.network.parameters(), betas=(0.5, 0.9), fused=True,
                                           lr=min(settings.tokenizer_lr, 3e-4))

    def loss(self, image, rebuilt, image_loss):
        """Gives the network its gradient; its optimizer steps together with the tokenizer's.
        -> the loss () that makes the tokenizer please the critic, weighted so that its gradient is
        as long as that of `image_loss`"""
        with self.autocast():
            scores = self.model(torch.cat([image, rebuilt.detach()]))
        scale = self.loss_scale.scale
        scale(hinge(*scores.float().chunk(2)) / self.parts).backward()
        self.network.requires_grad_(False)                 # the next pass must not teach it
        with self.autocast():
            generator_loss = -self.network(rebuilt).float().mean()
        self.network.requires_grad_(True)
        weight = adaptive_weight(scale(image_loss), scale(generator_loss), self.last.weight)
        return weight * generator_loss


def hinge(real, fake):
    """What the critic minimises: scores of real patches above 1, of rebuilt ones below -1."""
    return (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2


def adaptive_weight(other, adversarial, weight):
    """Esser et al. 2021, eq. 7: how many times longer the other losses' gradient is, at the
    decoder's last weights, than the adversarial loss's. -> (), no more than 10,000. A constant:
    without create_graph nothing can go backward through it."""
    # Exercise 05_3
    long, = torch.autograd.grad(other, weight, retain_graph=True)
    short, = torch.autograd.grad(adversarial, weight, retain_graph=True)
    return (long.norm() / (short.norm() + 1e-4)).clamp(max=1e4)


def start_late(progress, start=0.2, warm_up=0.2):
    """Share of the adversarial weight at this share of the training: 0 until images are worth
    criticising, then rising slowly, as the critic too has to learn first."""
    return min(max(0.0, (progress - start) / warm_up), 1.0)
