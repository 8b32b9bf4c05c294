"""A CDM of points in the plane, whose exact density is known.

Trains on a mixture of five Gaussians in a ring, then compares `log p(x)` and samples with the truth.
About 45 seconds on one CPU core; `STEPS=50` makes it shorter and worse.
"""

import math
import os

import torch
from torch import Tensor

from cdm_fast import CDM, MLP, NoiseSchedule, cdm_loss, sample

RADIUS, SIGMA, COMPONENTS = 1.5, 0.4, 5


def centres() -> Tensor:
    """(5, 2) means of the components, on a circle."""
    angle = torch.arange(COMPONENTS) * (2 * math.pi / COMPONENTS)
    return RADIUS * torch.stack((angle.cos(), angle.sin()), dim=1)


def draw(num: int, generator: torch.Generator) -> Tensor:
    """(num, 2) points of the mixture."""
    component = torch.randint(COMPONENTS, (num,), generator=generator)
    return centres()[component] + SIGMA * torch.randn(num, 2, generator=generator)


def true_log_prob(x: Tensor) -> Tensor:
    """(num,) log-density of the mixture at x (num, 2), in nats."""
    squared = torch.cdist(x, centres()).square()
    log_normal = -squared / (2 * SIGMA**2) - math.log(2 * math.pi * SIGMA**2)
    return log_normal.logsumexp(1) - math.log(COMPONENTS)


def main() -> None:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    schedule = NoiseSchedule.uniform(T=50)
    model = CDM(MLP(2, schedule.num_levels, hidden=128, depth=3), schedule)
    steps = int(os.environ.get("STEPS", 2000))
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        loss = cdm_loss(model, draw(256, generator), ce_weight=1.0, generator=generator).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()

    model.eval()
    x = draw(2000, generator)
    with torch.no_grad():
        difference = model.log_prob(x) - true_log_prob(x)
    print(f"log p(x) minus the truth: mean {difference.mean():+.3f}, spread {difference.std():.3f} nats")
    drawn = sample(model, 2000, sampler="ddpm", steps=50)
    distance = torch.cdist(drawn, centres()).min(1).values
    truth = torch.cdist(x, centres()).min(1).values
    print(f"distance to the nearest centre: {distance.mean():.3f} drawn, {truth.mean():.3f} true")


if __name__ == "__main__":
    main()
