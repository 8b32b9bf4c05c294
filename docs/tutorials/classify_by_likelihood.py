# %% [markdown]
# # Classify by likelihood
#
# A CDM with class labels is a generative classifier. With a joint head it has a logit for every pair of
# noise level and class, so one forward pass gives `log p(x | c)` for every class c, and Bayes' rule gives
# the posterior.

# %%
import os
from dataclasses import replace
from pathlib import Path
from tempfile import mkdtemp

import torch

from cdm_fast import load
from cdm_fast.config import preset
from cdm_fast.data import dequantize, load_data
from cdm_fast.evaluation.classification import evaluate_classes
from cdm_fast.training.train import train

config = preset("digits-encoder")
config = replace(
    config,
    train=replace(config.train, steps=int(os.environ.get("STEPS", 300))),
    output=replace(config.output, evaluate_every=0),
)
run = Path(mkdtemp()) / "digits"
train(config, run)
model = load(run)

# %% [markdown]
# One image, all classes:

# %%
test = load_data("digits", "test")
x = dequantize(test.images[:1], test.num_grey_levels, torch.Generator().manual_seed(0))
with torch.no_grad():
    log_p = model.log_prob_classes(x)[0]  # nats, log p(x | c)
print(f"the image is a {int(test.labels[0])}; log p(x | c) = {[round(float(value)) for value in log_p]}")

# %% [markdown]
# The whole test split: accuracy, calibration error of the posterior, and bits per dimension of the same
# images, from the same passes.

# %%
report = evaluate_classes(model, test, draws=1)
print(f"accuracy {100 * report.accuracy:.1f} +- {100 * report.accuracy_stderr:.1f} %")
print(f"calibration error {100 * report.ece:.1f} %, {report.bits_per_dim:.3f} bits/dim")
