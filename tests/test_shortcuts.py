"""The planted cues of the study of shortcuts: how often they are right, and what they do to the images."""

import pytest
import torch

from benchmarks.studies import shortcuts
from benchmarks.studies.shortcuts import ALIGNED, CUES, planted
from cdm_fast import NoiseSchedule, UserError
from cdm_fast.data import ImageData, load_data
from cdm_fast.evaluation.classification import evaluate_classes
from cdm_fast.model.classifier import Classifier


@pytest.mark.parametrize("cue", CUES)
@pytest.mark.parametrize("split", ALIGNED)
def test_a_cue_is_right_as_often_as_it_says(cue, split):
    data = load_data("digits", split)
    changed, aligned = planted(cue, data, seed=0)
    share = ALIGNED[split]
    assert abs(float(aligned.double().mean()) - share) < 3 * (share * (1 - share) / len(aligned)) ** 0.5
    assert torch.equal(changed.labels, data.labels)
    assert changed.images.shape[1] == (3 if cue == "colour" else 1)
    assert not torch.equal(changed.images[:, :1], data.images)
    again, _ = planted(cue, data, seed=0)
    assert torch.equal(again.images, changed.images)


def test_colours_leave_the_largest_channel_as_it_was():
    data = load_data("digits", "test")
    changed, aligned = planted("colour", data, seed=0)
    assert torch.equal(changed.images.amax(1, keepdim=True), data.images)
    ratio = changed.images.float().sum((2, 3))
    hue = (ratio / ratio.amax(1, keepdim=True)).round(decimals=1)
    kinds = [hue[aligned & (data.labels == c)].unique(dim=0) for c in range(10)]
    assert all(len(kind) == 1 for kind in kinds) and len(torch.cat(kinds).unique(dim=0)) == 10


def test_corners_spell_the_class():
    data = load_data("digits", "test")
    changed, aligned = planted("mark", data, seed=0)
    corners = changed.images[:, 0, [0, 0, -1, -1], [0, -1, 0, -1]].long() // 16
    spelled = (corners * torch.tensor([1, 2, 4, 8])).sum(1) - 1
    assert torch.equal(spelled == data.labels, aligned)
    assert int((changed.images != data.images).sum((1, 2, 3)).max()) <= 4


def test_stripes_stay_behind_the_digit():
    data = load_data("digits", "test")
    changed, _ = planted("texture", data, seed=0)
    bright = data.images > 8
    assert torch.equal(changed.images[bright], data.images[bright])
    assert int(changed.images[~bright].max()) == 8 and bool((changed.images >= data.images).all())


def test_rare_classes_keep_a_tenth_of_their_training_images():
    train, common = planted("imbalance", load_data("digits", "train"), seed=0)
    assert bool((train.labels[common] < 5).all()) and bool((train.labels[~common] >= 5).all())
    assert 0.05 < int((~common).sum()) / int(common.sum()) < 0.15
    test, common = planted("imbalance", load_data("digits", "test"), seed=0)
    assert len(test) == 359 and 0.4 < float(common.double().mean()) < 0.6


class LeansToTheCommonClass(torch.nn.Module):
    """The same posterior for every image: the frequencies `counts`, and `evidence` for class 1."""

    num_classes, input_shape = 2, (1, 2, 2)

    def __init__(self, counts, evidence):
        super().__init__()
        self.logits = torch.nn.Parameter(counts.float().log() + torch.tensor([0.0, evidence]))

    def forward(self, x, *_):
        return self.logits.expand(len(x), 2)


def test_equal_classes_take_the_frequencies_of_training_out_of_a_posterior(monkeypatch, tmp_path):
    counts = torch.tensor([90.0, 10.0])
    model = Classifier(LeansToTheCommonClass(counts, 1.0), NoiseSchedule.uniform(T=10))
    images, labels = torch.zeros(8, 1, 2, 2, dtype=torch.uint8), torch.arange(8) % 2
    test = ImageData(images, labels, num_grey_levels=256, num_classes=2, name="black", split="test")
    monkeypatch.setattr(shortcuts, "load", lambda run: model)
    monkeypatch.setattr(shortcuts, "class_counts", lambda run: counts)
    own, equal = (shortcuts.accuracies(tmp_path, test, labels == 0, balanced) for balanced in (False, True))
    assert (own["easy"], own["hard"]) == (1.0, 0.0) and (equal["easy"], equal["hard"]) == (0.0, 1.0)
    with pytest.raises(UserError, match="class_prior does not go with a classifier"):
        evaluate_classes(model, test, class_prior=torch.ones(2))
