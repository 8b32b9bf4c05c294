# %% [markdown]
# # The density of a table
#
# `CDMDensity`, `DensityRatio` and `MutualInformation` are scikit-learn estimators: they take rows and
# columns of numbers instead of images. This tutorial fits the density of a table whose density is known.

# %%
import os

import numpy as np

from cdm_fast import CDMDensity, MutualInformation

rng = np.random.default_rng(0)
cov = np.array([[1.0, 0.8], [0.8, 1.0]])
X = rng.multivariate_normal([2.0, -1.0], cov, size=2000)
X_new = rng.multivariate_normal([2.0, -1.0], cov, size=500)

# %%
max_iter = int(os.environ.get("STEPS", 500))
density = CDMDensity(max_iter=max_iter, random_state=0).fit(X)
log_p = density.score_samples(X_new)

centred = X_new - [2.0, -1.0]
expected = -0.5 * (centred @ np.linalg.inv(cov) * centred).sum(1) - 0.5 * np.log(
    np.linalg.det(2 * np.pi * cov)
)
print(f"mean log p: {log_p.mean():.3f} nats, truth {expected.mean():.3f}")

# %% [markdown]
# The fitted density also draws rows.

# %%
rows = density.sample(1000)
print("covariance of drawn rows:", np.cov(rows.T).round(2).tolist())

# %% [markdown]
# The mutual information of two correlated normal columns is `-log(1 - rho^2) / 2` nats.

# %%
found = MutualInformation(max_iter=max_iter, random_state=0).fit(X[:, :1], X[:, 1:])
low, high = found.confidence_interval_
truth = -0.5 * np.log(1 - 0.8**2)
print(f"{found.mutual_information_:.3f} nats in [{low:.3f}, {high:.3f}], truth {truth:.3f}")
