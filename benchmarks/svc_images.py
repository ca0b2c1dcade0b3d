"""Images for the SVC experiment: Fashion-MNIST as a small network sees it, moved in twelve ways.

One base network learns the images as they are; each fine-tune learns them under one shift, with the
last layer as the base has it, so that all of them speak of the ten classes in the same way.
"""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.functional import affine_grid, cross_entropy, grid_sample

FASHION = Path("/usr/share/datasets/fashion-mnist")
CHOOSE = 5000  # of the 60,000 training images; no network is trained on them
BATCH, LEARNING_RATE = 128, 1e-3
BASE_STEPS, TASK_STEPS, TASK_IMAGES = 1200, 400, 12000
WIDTH = 256

Shift = Callable[[torch.Tensor], torch.Tensor]


class Images(NamedTuple):
    """Gray values from 0 to 1, (images, 1, 28, 28), and classes, (images,)."""

    pixels: torch.Tensor
    labels: torch.Tensor


class Shifted:
    """A suite as experiment_svc.py asks for it: one kind of shifts."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.name = f"images-{kind}"
        self.seeds = (0, 1, 2)

    def tasks(self) -> list[str]:
        return list(SHIFTS[self.kind])

    def about(self) -> str:
        """What the numbers depend on beside the code."""
        return "Fashion-MNIST"

    def train(self, seed: int, folder: Path) -> None:
        """Write the base and the fine-tuned networks; a seed draws weights and images."""
        torch.manual_seed(seed)
        images = fashion("train")
        base = network()
        fit(base, images, BASE_STEPS)
        save(base, folder / "base")
        for name, shift in SHIFTS[self.kind].items():
            drawn = torch.randint(len(images.labels), (TASK_IMAGES,))
            moved = Images(shift(images.pixels[drawn]), images.labels[drawn])
            tuned = network()
            tuned.load_state_dict(base.state_dict())
            tuned[-1].requires_grad_(False)
            fit(tuned, moved, TASK_STEPS)
            save(tuned, folder / name)

    @torch.inference_mode()
    def answers(self, model: Path, part: str) -> torch.Tensor:
        """Tell which images a network gets right under each shift: bool, (tasks, images)."""
        tuned = network()
        tuned.load_state_dict(load_file(model / "model.safetensors"))
        labels, seen = fashion(part).labels, shifted(self.kind, part)
        return torch.stack([tuned(pixels).argmax(dim=1) == labels for pixels in seen])


@cache
def shifted(kind: str, part: str) -> list[torch.Tensor]:
    """A part's images under each shift."""
    return [shift(fashion(part).pixels) for shift in SHIFTS[kind].values()]


@cache
def fashion(part: str) -> Images:
    """The images to train on, to choose by, or to report by: the last are the test set."""
    kind = "t10k" if part == "report" else "train"
    pixels = _read(f"{kind}-images-idx3-ubyte.gz", 16).view(-1, 1, 28, 28).float() / 255
    labels = _read(f"{kind}-labels-idx1-ubyte.gz", 8).long()
    wanted = {"train": slice(-CHOOSE), "choose": slice(-CHOOSE, None), "report": slice(None)}[part]
    return Images(pixels[wanted], labels[wanted])


def _read(name: str, header: int) -> torch.Tensor:
    content = gzip.decompress((FASHION / name).read_bytes())
    return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=header)


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Flatten(),
        *(nn.Linear(28 * 28, WIDTH), nn.ReLU()),
        *(nn.Linear(WIDTH, WIDTH), nn.ReLU()),
        nn.Linear(WIDTH, 10),
    )


def fit(model: nn.Sequential, images: Images, steps: int) -> None:
    """Train whatever asks for gradients, on images drawn with torch's global generator."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=LEARNING_RATE)
    for _ in range(steps):
        drawn = torch.randint(len(images.labels), (BATCH,))
        loss = cross_entropy(model(images.pixels[drawn]), images.labels[drawn])
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()


def save(model: nn.Sequential, folder: Path) -> None:
    """Write a checkpoint folder like those of large models."""
    folder.mkdir()
    save_file(model.state_dict(), folder / "model.safetensors")
    config = {"model_type": "perceptron", "hidden_size": WIDTH, "dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")


def rotate(pixels: torch.Tensor, degrees: float) -> torch.Tensor:
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    turn = torch.tensor([[[cosine, -sine, 0.0], [sine, cosine, 0.0]]]).expand(len(pixels), -1, -1)
    grid = affine_grid(turn, list(pixels.shape), align_corners=False)
    return grid_sample(pixels, grid, align_corners=False)


SHIFTS: dict[str, dict[str, Shift]] = {
    "related": {
        f"rotated-{degrees}": partial(rotate, degrees=degrees) for degrees in range(30, 106, 15)
    },
    "mixed": {
        "rotated-90": partial(rotate, degrees=90),
        "rotated-180": partial(rotate, degrees=180),
        "inverted": lambda pixels: 1 - pixels,
        "mirrored-inverted": lambda pixels: 1 - pixels.flip(3),
        "shifted": lambda pixels: pixels.roll((6, 6), (2, 3)),
        "transposed-faint": lambda pixels: 0.25 + 0.4 * pixels.transpose(2, 3),
    },
}
