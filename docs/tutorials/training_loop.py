# %% [markdown]
# # Your own training loop
#
# The library's parts work without its trainer. A CDM is a network and a noise schedule; `cdm_loss` is an
# ordinary scalar whose `backward()` needs no second derivative, because the input gradient is part of the
# forward pass.

# %%
import os

import torch

from cdm_fast import CDM, Encoder, NoiseSchedule, cdm_loss, sample
from cdm_fast.data import dequantize, load_data

data = load_data("digits", "train")
generator = torch.Generator().manual_seed(0)

# %% [markdown]
# The network has one logit for each noise level: `T` levels of noisy data, clean data, and pure noise.

# %%
torch.manual_seed(0)
schedule = NoiseSchedule.uniform(T=100)
network = Encoder(
    8, 1, schedule.num_levels, base_channels=32, multipliers=(1, 2), attention_resolutions=(4,), num_groups=8
)
model = CDM(network, schedule)
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)

# %%
for step in range(int(os.environ.get("STEPS", 200))):
    index = torch.randint(len(data), (64,), generator=generator)
    x0 = dequantize(data.images[index], data.num_grey_levels, generator)
    terms = cdm_loss(model, x0, ce_weight=0.01, generator=generator)
    optimizer.zero_grad()
    terms.loss.backward()
    optimizer.step()
    if step % 50 == 0:
        ce, mse = float(terms.ce.detach()), float(terms.mse.detach())
        print(f"step {step}: cross-entropy {ce:.2f} nats, squared error {mse:.3f}")

# %% [markdown]
# The trained model denoises, scores and samples. `denoise` returns the expected noise, `predict_x0` the
# expected clean image.

# %%
model.eval()
x0 = dequantize(data.images[:4], data.num_grey_levels, generator)
level = 30
eps = torch.randn(x0.shape, generator=generator)
x_t = schedule.a[level] * x0 + schedule.s[level] * eps
with torch.no_grad():
    x0_hat = model.predict_x0(x_t, level)
    log_p = model.log_prob(x0)
print(f"error of the denoised images: {float((x0_hat - x0).square().mean()):.3f}")
print(f"log p(x) in nats: {[round(float(value), 1) for value in log_p]}")
print(sample(model, 4, sampler="dpm_solver_pp_2m", steps=10).shape)
