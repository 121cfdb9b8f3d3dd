"""Semantic segmentation on an EPSANet, by segmentation_models_pytorch and nothing of ours but the backbone."""

from __future__ import annotations

import segmentation_models_pytorch as smp
import torch
from making import real_data
from torch.nn import functional as F
from torchvision.transforms.v2.functional import pil_to_tensor

import epsanet.network.epsanet  # noqa: F401 - registers the variants
from epsanet.data.coco import CocoSamples

SIZE, IMAGES = 64, 4


def labelled() -> tuple[torch.Tensor, torch.Tensor, int]:
    """Images of shape ``N, 3, 64, 64`` of coco100, and the class of each pixel of shape ``N, 64, 64``, 0 for none."""
    folder = real_data("coco100")
    samples = CocoSamples(folder / "annotations" / "instances_train2017.json", folder / "train2017")
    images, labels = [], []
    for position in range(IMAGES):
        image, objects = samples.read(position)
        assert objects.masks is not None
        label = torch.zeros(image.height, image.width)
        for mask, number in zip(objects.masks, objects.labels, strict=True):
            label[mask.bool()] = float(number + 1)
        images.append(F.interpolate(pil_to_tensor(image)[None] / 255, (SIZE, SIZE), mode="bilinear", antialias=True))
        labels.append(F.interpolate(label[None, None], (SIZE, SIZE), mode="nearest")[:, 0].long())
    return torch.cat(images), torch.cat(labels), len(samples.class_names) + 1


def test_a_segmentation_network_on_an_epsanet_learns_the_masks_of_coco() -> None:
    images, labels, classes = labelled()
    assert len(labels.unique()) > 3
    model = smp.Unet("tu-epsanet50_small", encoder_weights=None, classes=classes)
    assert any(type(module).__name__ == "PSA" for module in model.encoder.modules())
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    losses = []
    for _ in range(8):
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.75 * losses[0]
    gradients = {name: parameter.grad for name, parameter in model.encoder.named_parameters()}
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients.values())
    assert all(gradient.any() for name, gradient in gradients.items() if ".spc." in name)
    assert any(".spc." in name for name in gradients)
