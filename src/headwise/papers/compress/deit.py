"""A second token beside the class token learns what a teacher says.

A vision transformer knows nothing about images before it is trained and needs hundreds of millions
of them, or a teacher that does know. DeiT gives the student a distillation token, which attends
like the class token and has a head of its own; the class token learns the labels, the distillation
token the teacher's answers, best of all as hard labels: the class that a convolutional teacher
would name for this very crop. Both heads' answers are averaged in the end. Teacher and label
disagree where an augmented image no longer shows its label, and so the two tokens become different.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from headwise.models.backbones import VisionPatches
from headwise.papers import Measured, at_least, at_most, claim, paper
from headwise.parts import Attention
from headwise.tasks import Digits
from headwise.train import seeded


@paper(
    title="Training data-efficient image transformers & distillation through attention",
    source="arXiv 2012.12877",
    year=2020,
    modality="image",
    plain="A distillation token beside the class token learns a teacher's hard labels; both heads' "
    "answers are averaged.",
    equation=r"\mathcal{L} = \tfrac12 \mathrm{CE}(\psi(Z_{\mathrm{cls}}), y) + "
    r"\tfrac12 \mathrm{CE}(\psi(Z_{\mathrm{dist}}), \mathrm{argmax}_c Z_t(c))",
    parts=("Attention",),
    reported="DeiT-B: 83.1 % on ImageNet-1K without other images, trained in three days on one "
    "machine; 85.2 % with distillation from a RegNetY-16GF at 384 pixels.",
    taxonomy=("beyond/compression", "application/vision"),
    use="""
import torch
from headwise.papers.compress.deit import DeiT, distillation_loss

model = DeiT(image_size=8, patch_size=2, dim=32, depth=3, heads=4, classes=10, channels=1)
images, labels, teacher = torch.randn(4, 1, 8, 8), torch.arange(4), torch.randn(4, 10)
by_class, by_distillation = model.both(images)
loss = distillation_loss(by_class, by_distillation, labels, teacher)  # or model.loss(...)
""",
)
class DeiT(nn.Module):
    """A vision transformer with a class and a distillation token, a linear head for each."""

    main_input_name = "pixel_values"

    def __init__(
        self,
        image_size: int,
        patch_size: int,
        dim: int,
        depth: int,
        heads: int,
        classes: int,
        channels: int = 3,
    ) -> None:
        super().__init__()
        self.vision = VisionPatches(
            image_size,
            patch_size,
            dim,
            depth,
            mixer=lambda layer: Attention(dim, heads),
            channels=channels,
            class_token=True,
        )
        # its place is learned with it: there is one of it only
        self.distillation_token = nn.Parameter(0.02 * torch.randn(dim))
        self.class_head, self.distillation_head = (nn.Linear(dim, classes) for _ in range(2))

    def tokens(self, pixel_values: Tensor) -> Tensor:
        """`(batch, 2 + patches, dim)` after the last layer."""
        x, _ = self.vision.embed(pixel_values)
        asked = self.distillation_token.expand(len(x), 1, -1)
        found: Tensor = self.vision.stack(torch.cat([x[:, :1], asked, x[:, 1:]], 1))
        return found

    def both(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Logits `(batch, classes)` of the class token and of the distillation token."""
        x = self.tokens(pixel_values)
        return self.class_head(x[:, 0]), self.distillation_head(x[:, 1])

    def loss(self, pixel_values: Tensor, labels: Tensor, teacher: Tensor) -> Tensor:
        """Hard distillation (equation 3); `teacher`: logits `(batch, classes)`."""
        return distillation_loss(*self.both(pixel_values), labels, teacher)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """The mean of both, which is what is used after training."""
        one, other = self.both(pixel_values)
        return (one + other) / 2


def distillation_loss(
    by_class: Tensor,
    by_distillation: Tensor,
    labels: Tensor,
    teacher: Tensor,
    hard: bool = True,
    share: float = 0.1,
    temperature: float = 3.0,
) -> Tensor:
    """Equation 3 of the paper; with hard=False equation 2: (1 - share) CE + share T^2 KL, of the
    distillation token and the teacher's logits `(batch, classes)`, both softened by T."""
    supervised = F.cross_entropy(by_class, labels)
    if hard:
        return (supervised + F.cross_entropy(by_distillation, teacher.argmax(-1))) / 2
    told = F.kl_div(
        (by_distillation / temperature).log_softmax(-1),
        (teacher / temperature).log_softmax(-1),
        reduction="batchmean",
        log_target=True,
    )
    return (1 - share) * supervised + share * temperature**2 * told


# -- experiments ----------------------------------------------------------------------------------

SEEDS = (0, 1)


class LabelsAgain(DeiT):
    """The control: no teacher, both tokens learn the label."""

    def loss(self, pixel_values: Tensor, labels: Tensor, teacher: Tensor) -> Tensor:
        return distillation_loss(*self.both(pixel_values), labels, F.one_hot(labels, 10).float())


@cache
def data(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images with labels, of which three tenths are wrong, as if a crop no longer showed what its
    label says; and 360 others to be tested on."""
    task, random = Digits(seed=seed), torch.Generator().manual_seed(seed)
    train, test = task.all("train"), task.all("test")
    labels = train.targets.clone()
    wrong = torch.rand(len(labels), generator=random) < 0.3
    labels[wrong] = torch.randint(0, 10, (int(wrong.sum()),), generator=random)
    return train.inputs["pixel_values"], labels, test.inputs["pixel_values"], test.targets


def learn(model: nn.Module, loss: Callable[[Tensor, Tensor], Tensor], seed: int, steps: int,
          rate: float) -> None:  # fmt: skip
    images, labels, _, _ = data(seed)
    random = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps)
    with torch.enable_grad():
        for _ in range(steps):
            drawn = torch.randint(0, len(images), (64,), generator=random)
            loss(images[drawn], labels[drawn]).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()


@cache
def convolutional(seed: int) -> nn.Module:
    """The teacher: two convolutions that learn from the same 300 labels."""
    with seeded(seed):
        model = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.AdaptiveMaxPool2d(2),
            nn.Flatten(),
            nn.Linear(128, 10),
        )
    learn(model, lambda x, y: F.cross_entropy(model(x), y), seed, 300, 1e-2)
    return model.eval()


@cache
def student(kind: Any, seed: int) -> DeiT:
    teacher = convolutional(seed)
    with seeded(seed):
        model: DeiT = kind(8, 2, 32, 3, 4, 10, channels=1)

    def loss(images: Tensor, labels: Tensor) -> Tensor:
        with torch.no_grad():
            said = teacher(images)
        return model.loss(images, labels, said)

    learn(model, loss, seed, 250, 5e-3)
    return model.eval()


@claim(control=LabelsAgain, unit="nats")
def loss_as_written(kind: type[DeiT], seed: int) -> Measured:
    """Against logarithms summed by hand in float64, of labels and of the teacher's first choice."""
    torch.manual_seed(seed)
    model = kind(8, 2, 16, 1, 2, 10, channels=1).double()
    images, teacher = torch.randn(6, 1, 8, 8).double(), torch.randn(6, 10).double()
    labels = torch.arange(6)
    with torch.no_grad():
        found = model.loss(images, labels, teacher)
        x = model.tokens(images)
    want = 0.0
    for row in range(6):
        for token, head, answer in (
            (0, model.class_head, int(labels[row])),
            (1, model.distillation_head, max(range(10), key=teacher[row].tolist().__getitem__)),
        ):
            z = (head.weight @ x[row, token] + head.bias).tolist()
            want += (math.log(sum(math.exp(v) for v in z)) - z[answer]) / 12
    return at_most(abs(float(found) - want), 1e-9)


@claim(
    control=LabelsAgain, unit="accuracy above learning the labels twice", seeds=SEEDS, quick=False
)
def a_teacher_is_worth_more_than_its_labels(kind: Any, seed: int) -> Measured:
    """Three tenths of the labels are wrong, for the teacher too, a small convolutional net: the
    student that hears it is right on 4 points more of the test images."""
    _, _, images, labels = data(seed)
    with torch.no_grad():
        shares = [
            float((model(images).argmax(-1) == labels).float().mean())
            for model in (student(kind, seed), student(LabelsAgain, seed), convolutional(seed))
        ]
    return at_least(shares[0] - shares[1], 0.04, student=shares[0], teacher=shares[2])


@claim(control=LabelsAgain, unit="share of images more on which it differs", seeds=SEEDS,
       quick=False)  # fmt: skip
def the_distillation_head_follows_the_teacher(kind: Any, seed: int) -> Measured:
    """On test images that neither has seen, the distillation head names another class than the
    teacher less often, by 3 points of the images at least, than one that learns the labels."""
    images = data(seed)[2]
    with torch.no_grad():
        teacher = convolutional(seed)(images).argmax(-1)
        apart = [
            float((student(one, seed).both(images)[1].argmax(-1) != teacher).float().mean())
            for one in (kind, LabelsAgain)
        ]
    return at_most(apart[0] - apart[1], -0.03, taught=apart[0], untaught=apart[1])
