"""Muon for the matrices inside the model, AdamW for everything else, both over flat buffers."""

from collections import defaultdict
from typing import Any, TypedDict

import torch
from torch import nn

Tensor = torch.Tensor
MUON_RATE, ADAM_RATE = 0.02, 0.003
MUON_DECAY, ADAM_DECAY = 0.02, 0.0
MOMENTUM = 0.95
BETAS = (0.9, 0.98)
CLIP = 1.0
SHAPE_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


class State(TypedDict):
    """All that a later run needs to continue exactly."""

    values: Tensor
    momentum: Tensor
    adam: dict[str, Any]


class Optimizer:
    """Updates a model's parameters from their gradients.

    Parameters and gradients become views of one float32 buffer each (`values`, `gradients`), so that averaging over
    workers, clipping and zeroing are single operations.
    """

    def __init__(self, model: nn.Module) -> None:
        named = dict(model.named_parameters())
        inner = {name: parameter for name, parameter in named.items() if _is_matrix(name, parameter)}
        parameters = [*inner.values(), *(parameter for name, parameter in named.items() if name not in inner)]
        self.values = torch.cat([parameter.detach().flatten() for parameter in parameters])
        self.gradients = torch.zeros_like(self.values)
        start = 0
        for parameter in parameters:
            end = start + parameter.numel()
            parameter.data = self.values[start:end].view(parameter.shape)
            parameter.grad = self.gradients[start:end].view(parameter.shape)
            start = end
        split = sum(parameter.numel() for parameter in inner.values())
        self.momentum = torch.zeros(split)
        self.stacks = _by_shape([parameter.shape for parameter in inner.values()])
        rest = nn.Parameter(self.values[split:])
        rest.grad = self.gradients[split:]
        self.adam = torch.optim.AdamW([rest], lr=ADAM_RATE, betas=BETAS, weight_decay=ADAM_DECAY, fused=True)

    def step(self, fraction: float) -> float:
        """One update at `fraction` of the peak rates; clears the gradients and returns their norm before clipping."""
        norm = float(self.gradients.norm())
        if norm > CLIP:
            self.gradients.mul_(CLIP / norm)
        self.adam.param_groups[0]["lr"] = ADAM_RATE * fraction
        self.adam.step()
        self._muon(MUON_RATE * fraction)
        self.gradients.zero_()
        return norm

    def state(self) -> State:
        """Parameters and averages as they are now; not copies."""
        return {"values": self.values, "momentum": self.momentum, "adam": self.adam.state_dict()}

    def load(self, state: State) -> None:
        """Continues from `state`, in place."""
        self.values.copy_(state["values"])
        self.momentum.copy_(state["momentum"])
        self.adam.load_state_dict(state["adam"])

    def _muon(self, rate: float) -> None:
        gradient, values = self.gradients[: self.momentum.numel()], self.values[: self.momentum.numel()]
        self.momentum.lerp_(gradient, 1 - MOMENTUM)
        ahead = gradient.lerp(self.momentum, MOMENTUM)
        values.mul_(1 - rate * MUON_DECAY)
        for (rows, columns), starts in self.stacks.items():
            size = rows * columns
            stack = torch.stack([ahead[start : start + size] for start in starts]).view(-1, rows, columns)
            update = orthogonalized(stack).flatten(1).float() * max(1.0, rows / columns) ** 0.5
            for start, matrix in zip(starts, update, strict=True):
                values[start : start + size].sub_(matrix, alpha=rate)


def orthogonalized(stack: Tensor) -> Tensor:
    """Matrices [N, rows, columns] with their singular values moved to about 1, by five quintic Newton-Schulz steps in
    bfloat16 (Muon, Jordan et al., 2024)."""
    x: Tensor = stack.bfloat16() / (stack.norm(dim=(1, 2), keepdim=True) + 1e-7).bfloat16()
    tall = x.shape[1] > x.shape[2]
    x = (x.mT if tall else x).contiguous()
    a, b, c = SHAPE_COEFFICIENTS
    for _ in range(5):
        square = x @ x.mT
        x = a * x + (b * square + c * (square @ square)) @ x
    return x.mT if tall else x


def _is_matrix(name: str, parameter: nn.Parameter) -> bool:
    outside = ("embed", "conv1d", ".gate.weight", "shared_expert_gate", "in_proj_a", "in_proj_b")
    return parameter.ndim in (2, 3) and not any(part in name for part in outside)


def _by_shape(shapes: list[torch.Size]) -> dict[tuple[int, int], list[int]]:
    """Where in the flat buffer the matrices of each shape start; experts' 3-D weights are one matrix per expert."""
    stacks: dict[tuple[int, int], list[int]] = defaultdict(list)
    start = 0
    for shape in shapes:
        rows, columns = shape[-2:]
        for _ in range(shape.numel() // (rows * columns)):
            stacks[rows, columns].append(start)
            start += rows * columns
    return dict(stacks)
