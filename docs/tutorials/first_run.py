# %% [markdown]
# # A first run
#
# This tutorial trains a Classification Diffusion Model (CDM) on handwritten digits of 8x8 pixels, draws new
# digits from it, and reads the log-likelihood of test images from a single forward pass. It takes about a
# minute on two CPU cores; the images come with scikit-learn.
#
# On the command line, `cdm-fast train` does the same with the preset's 2500 steps, and validates while it
# trains.

# %%
import os
from dataclasses import replace
from pathlib import Path
from tempfile import mkdtemp

from cdm_fast import load, sample
from cdm_fast.config import preset
from cdm_fast.data import load_data, write_grid
from cdm_fast.likelihood import evaluate
from cdm_fast.training.train import train

# %% [markdown]
# A preset is a frozen dataclass that describes a whole run: data, noise levels, network, optimizer, output.
# `replace` makes a modified copy. 300 steps are few, but enough to see that it works.

# %%
steps = int(os.environ.get("STEPS", 300))
config = preset("digits-encoder")
config = replace(
    config,
    train=replace(config.train, steps=steps),
    output=replace(config.output, evaluate_every=0),
)

run = Path(mkdtemp()) / "digits"
summary = train(config, run)
print(f"{summary['step']} steps, stopped because {summary['stopped']}")

# %% [markdown]
# The run directory holds everything: configuration, checkpoints, the log, and pictures. `load` returns the
# model with averaged weights, in evaluation mode.

# %%
model = load(run)
print(sorted(path.name for path in run.iterdir()))

# %% [markdown]
# ## Draw images
#
# `sample` returns images in [-1, 1] of shape (N, C, H, W). The same seed gives the same images. The preset
# trains with class labels, so a label chooses the digit.

# %%
images = sample(model, 16, sampler="blind", steps=50, seed=0, label=3)
write_grid(images, run / "threes.png")
print(images.shape)

# %% [markdown]
# ## Read likelihoods
#
# `log_prob` takes one forward pass and returns nats. `evaluate` follows the protocol of the field: it
# dequantises the pixels with uniform noise and reports bits per dimension.

# %%
test = load_data("digits", "test")
report = evaluate(model, test, draws=1)
print(f"{report.bits_per_dim:.3f} +- {report.bits_per_dim_stderr:.3f} bits/dim, {report.num_images} images")

# %% [markdown]
# A single pass may be wrong by a constant, because its normalisation is learned. `cdm-fast nll RUN --method
# audit` measures that constant; [likelihoods](../explanation/likelihood.md) explains how.
