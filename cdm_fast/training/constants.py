"""Refits the constants of a CDM's logits after training on newly noised training images, with fixed weights.

`cdm_fast.model.constants` has the equations and their solution.

# n rows, L = T+2 noise levels, K classes, N = (L-1) K + 1 logits, P constants per level
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from cdm_fast.data import ImageData
from cdm_fast.data.pixels import dequantize
from cdm_fast.errors import UserError
from cdm_fast.host.progress import Progress, silent
from cdm_fast.model import CDM, evaluation_mode
from cdm_fast.model.constants import FEWEST_ROWS, Compared, Rows, compare_classes, error_root, fit_shift
from cdm_fast.model.denoiser import like_network
from cdm_fast.nn.heads import CumulativeHead, JointHead, LowRankHead
from cdm_fast.runs.calibration import fingerprint, require_head
from cdm_fast.runs.constants import Constants
from cdm_fast.training.levels import stratified_levels

CHUNK = 512  # rows per forward pass
STORED = 2**27  # logits that are kept in memory, 0.5 GiB; further rows are used for one last step
MOST_CONSTANTS = 3000  # with more, all classes of a level share one: Newton's matrix is dense


@dataclass(frozen=True)
class Draw:
    """Noised images of a data set: levels from p(t), stratified in each chunk, new noise for every row."""

    model: CDM
    data: ImageData
    flip: bool

    def __call__(self, num: int, generator: torch.Generator, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(x_t (num, C, H, W), level (num,), index (num,)) of images drawn from the indices `images`."""
        index = images[torch.randint(len(images), (num,), generator=generator)]
        x = dequantize(self.data.images[index], self.data.num_grey_levels, generator, self.data.pixels)
        if self.flip:
            mirrored = torch.rand(num, generator=generator) < 0.5
            x = torch.where(mirrored[:, None, None, None], x.flip(3), x)
        level = stratified_levels(self.model.log_level_prior.double().cpu().exp(), num, generator)
        return (
            like_network(self.model, self.model.schedule.noise(x, level, generator=generator)),
            level,
            index,
        )


@evaluation_mode
def refit_constants(
    model: CDM,
    data: ImageData,
    num_rows: int,
    *,
    flip: bool = False,
    null_class: bool = True,
    seed: int = 0,
    progress: Progress = silent,
) -> Constants:
    """The constants of the logits that best fit `num_rows` noised images of `data`; the model is not changed.

    A head over levels gets one constant per level. A joint head gets one for every (level, class) pair (for a
    low-rank head as far as its class vectors allow), or one per level if there are more than `MOST_CONSTANTS`
    pairs. A class embedding gets one per level for each class, fitted to rows of that class, and to the
    classes of as many rows as one class has, evaluated given every class.

    Args:
        model: a model without calibration or refitted constants.
        data: training images, on the CPU.
        num_rows: number of images drawn with replacement.
        flip: mirror half of them, as in training.
        null_class: also fit the null class of an embedding, which label dropout trains.
        progress: called with one-line messages.

    Raises:
        UserError: a network without a head of this library; fewer than `FEWEST_ROWS` rows for each constant.
    """
    head = copy.deepcopy(require_head(model))
    weights, draw = fingerprint(model.state_dict()), Draw(model, data, flip)
    generator = torch.Generator().manual_seed(seed)
    by_class: tuple[float, ...] = ()
    if model.conditioning == "embedding" and model.num_classes is not None:
        table = _fit_classes(draw, num_rows, null_class, generator, progress)
        by_class = tuple(table.flatten().tolist())
    else:
        basis = class_basis(head, model)
        _require_rows(num_rows, basis.shape[1] * (model.schedule.num_levels - 1))
        progress(f"fitting {basis.shape[1]} constants for each level to {num_rows} noised images")
        images = torch.arange(len(data.images))
        stored = _stored_rows(model)
        fit = fit_shift(lambda num: _scored(draw, num, generator, images), num_rows, basis, stored)
        shift_rows(head, fit.shift)
    bias = tuple(head.bias.double().tolist())
    return Constants(bias, by_class, weights, data.name, data.split, num_rows, seed)


def class_basis(head: CumulativeHead, model: CDM) -> Tensor:
    """(K, P) float64: the contribution of each constant of a level to the logits of its classes."""
    levels = model.schedule.num_levels - 1
    common = torch.ones(model.joint_classes, 1, dtype=torch.float64)
    if not isinstance(head, JointHead) or levels * head.rows_per_level > MOST_CONSTANTS:
        return common
    if isinstance(head, LowRankHead):  # z[t, c] = basis[t, 0] + sum_r v[c, r] basis[t, r]
        return torch.cat([common, head.classes.detach().double().cpu()], dim=1)
    return torch.eye(model.joint_classes, dtype=torch.float64)


@torch.no_grad()
def shift_rows(
    head: CumulativeHead,
    shift: Tensor,  # (L-1, P) nats
) -> None:
    """Adds the constants of `class_basis` to the logits of `head` through its bias, except for pure noise."""
    padded = torch.cat([shift, shift.new_zeros(1, shift.shape[1])])
    if shift.shape[1] == 1:
        head.shift(padded[:, 0])
    else:
        assert isinstance(head, JointHead)
        head.bias[:-1].unflatten(0, (-1, head.rows_per_level)).add_(padded.diff(dim=0).to(head.bias))


def _fit_classes(
    draw: Draw, num: int, null_class: bool, generator: torch.Generator, progress: Progress
) -> Tensor:
    """(K+1, L) constants of a class embedding: classes by their own images and by comparison, null by all."""
    model, labels = draw.model, draw.data.labels
    classes, levels = model.num_classes or 0, model.schedule.num_levels
    if labels is None:
        raise UserError(
            f"{draw.data.name} has no labels, and constants by class need some: give labelled data"
        )
    table, each = torch.zeros(classes + 1, levels, dtype=torch.float64), num // classes
    _require_rows(each, levels - 1)
    common = torch.ones(1, 1, dtype=torch.float64)
    errors: dict[int, Tensor] = {}
    for label in range(classes + null_class):
        images = torch.arange(len(labels)) if label == classes else (labels == label).nonzero()[:, 0]
        if not len(images):
            continue
        progress(f"fitting the constants of class {label} of {classes} to {each} noised images")
        asked = -1 if label == classes else label

        def score(num: int, images: Tensor = images, asked: int = asked) -> Iterator[Rows]:
            return _scored(draw, num, generator, images, asked)

        fit = fit_shift(score, each, common, _stored_rows(model))
        table[label, :-1] = fit.shift[:, 0]
        if label < classes:
            errors[label] = error_root(fit, each)
    present = sorted(errors)
    progress(f"comparing {len(present)} classes on {each} noised images")
    rows = _compared(draw, each, generator, present)
    root = torch.stack([errors[label] for label in present])
    table[present, :-1] = compare_classes(table[present, :-1], root, rows)
    return table


def _compared(draw: Draw, num: int, generator: torch.Generator, classes: list[int]) -> Compared:
    """`num` new rows but those of pure noise, evaluated given each of `classes`, those that have images."""
    model, labels = draw.model, draw.data.labels
    assert labels is not None
    images, parts = torch.arange(len(labels)), []
    for first in range(0, num, CHUNK):
        x, level, index = draw(min(CHUNK, num - first), generator, images)
        kept = level <= model.schedule.T
        x, level, index = x[kept], level[kept], index[kept]
        given = [torch.full((len(x),), label, device=x.device) for label in classes]
        score = [model.at_level_given(model.logits(x, c), level.to(x.device), c).float().cpu() for c in given]
        own = torch.searchsorted(torch.tensor(classes), labels[index].cpu())
        parts.append(Compared(torch.stack(score, 1), level, own))
    return Compared(*map(torch.cat, zip(*parts, strict=True)))


def _stored_rows(model: CDM) -> int:
    """So many rows have `STORED` logits."""
    return max(1, STORED // ((model.schedule.num_levels - 1) * model.joint_classes + 1))


def _require_rows(num: int, constants: int) -> None:
    if num < FEWEST_ROWS * constants:
        raise UserError(f"{num} rows for {constants} constants: give {FEWEST_ROWS} or more per constant")


def _scored(
    draw: Draw, num: int, generator: torch.Generator, images: Tensor, label: int | None = None
) -> Iterator[Rows]:
    """Logits of `num` new rows of the images with these indices, `CHUNK` at a time, in fp32 on the CPU.

    label: the label given to a class embedding; joint logits use each row's own class.
    """
    model, labels = draw.model, draw.data.labels
    for first in range(0, num, CHUNK):
        x, level, index = draw(min(CHUNK, num - first), generator, images)
        if label is None:
            logits, own = model.logits(x), level
        else:
            logits, own = model.logits(x, torch.full((len(x),), label, device=x.device)), level
        if model.joint_classes > 1:
            assert labels is not None, "joint logits are trained on labels"
            own = level * model.joint_classes + labels[index]
        yield Rows(logits.float().cpu(), own.clamp(max=logits.shape[1] - 1))
