"""Random weights for FID's Inception-v3: what tests compare networks and programs with, where nobody has a network."""

import torch
import torchvision
from torch import nn


def random_state(seed: int = 0) -> dict[str, torch.Tensor]:
    """Tensors of torchvision's Inception, whose names and shapes FID's Inception shares."""
    torch.manual_seed(seed)
    with torch.device("meta"):
        network = torchvision.models.inception_v3(
            weights=None, aux_logits=False, num_classes=1008, init_weights=False, transform_input=False
        )
    network = network.to_empty(device="cpu")
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            fan_in = module.weight[0].numel()
            nn.init.normal_(module.weight, std=(2 / fan_in) ** 0.5)
        elif isinstance(module, nn.BatchNorm2d):
            module.reset_parameters()
            nn.init.normal_(module.running_mean, std=0.1)
        elif isinstance(module, nn.Linear):
            module.reset_parameters()
    return network.state_dict()
