# %% [markdown]
# # Your own images
#
# Training reads images from a folder, a zip, an `.npz`, the files of MNIST and CIFAR, and other sources. This
# tutorial writes a small folder of pictures with one subfolder for each class, trains on it, and ranks
# pictures by how likely the model finds them. Replace the folder with your own.

# %%
import os
from dataclasses import replace
from pathlib import Path
from tempfile import mkdtemp

import torch

from cdm_fast import load
from cdm_fast.config import preset
from cdm_fast.data import dequantize, load_data, write_image
from cdm_fast.training.train import train

folder = Path(mkdtemp())
digits = load_data("digits", "train")
for name in ("zero", "one"):
    (folder / "pictures" / name).mkdir(parents=True)
for number, (image, label) in enumerate(zip(digits.images, digits.labels, strict=True)):
    if label < 2:
        name = ("zero", "one")[label]
        write_image(
            (image.int() * 255 // 16).to(torch.uint8), folder / "pictures" / name / f"{number:04}.png"
        )

# %% [markdown]
# `load_data` returns the images of one split; a warning names what it has not read. A source without a test
# split is divided into 70 % training, 10 % validation and 20 % test images, stratified by class; `split_seed`
# is the seed of this split.

# %%
train_images = load_data(folder / "pictures", "train")
test_images = load_data(folder / "pictures", "test")
shape = tuple(test_images.images.shape[1:])
print(f"{len(train_images)} training and {len(test_images)} test images of shape {shape}")
print(f"{train_images.num_classes} classes, {train_images.num_grey_levels} grey levels")

# %% [markdown]
# The image shape and the number of classes need no setting: they come from the data. On the command line:
#
#     cdm-fast train --data pictures --out runs/pictures --steps 300

# %%
config = preset("digits-encoder")
config = replace(
    config,
    data=replace(config.data, source=str(folder / "pictures")),
    train=replace(config.train, steps=int(os.environ.get("STEPS", 300)), batch_size=32),
    output=replace(config.output, evaluate_every=0),
)
run = folder / "run"
train(config, run)

# %% [markdown]
# Rank the test images by `log p(x)`. Pixels are integers, so they are dequantised first: the generator makes
# the noise reproducible.

# %%
model = load(run)
x = dequantize(test_images.images, test_images.num_grey_levels, torch.Generator().manual_seed(0))
with torch.no_grad():
    log_p = model.log_prob(x)
order = log_p.argsort()
print("least likely:", [round(float(value), 1) for value in log_p[order[:3]]])
print("most likely: ", [round(float(value), 1) for value in log_p[order[-3:]]])
