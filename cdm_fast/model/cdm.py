"""CDM: a denoiser, a score and a log-likelihood from one classifier of noise levels, by two theorems.

# B batch, d = number of values of one input, L = T+2 noise levels, K classes
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from cdm_fast.errors import UserError
from cdm_fast.model.denoiser import DDM, Denoiser
from cdm_fast.model.energy import Energy, log_normal
from cdm_fast.model.schedule import NoiseSchedule
from cdm_fast.nn import AdjointNetwork
from cdm_fast.nn.autograd import AutogradNetwork
from cdm_fast.nn.embedding import check_labels
from cdm_fast.nn.heads import Conditioning, logits_at
from cdm_fast.ops import denoise_epilogue, denoise_x0, level_logits, noise_level_ce
from cdm_fast.ops.precision import compute_dtype

# With this many classes or more, training never holds all joint logits at once
# (`ops/head_noise_level_ce.py`).
MANY_CLASSES = 30


class CDM(Energy):
    """A Classification Diffusion Model (arXiv 2402.10095): a classifier of noise levels that denoises.

    The differences of its logits `f(x)[t] = log p(t|x) + const` are log-density ratios between levels
    (Thm 3.2), and the input gradient of `F(x,t) = f(x)[T+1] - f(x)[t]` gives the optimal denoiser (Thm 3.1).

    There are two kinds of class conditioning. "embedding": the network takes the label as an input, and f
    depends on it. "joint": the network's logits are `z[t,c] = log p(t,c|x) + const` for every level t <= T
    and class c (entry `t K + c`), followed by one for pure noise, which has no class; a label selects
    `z[t,c]`, and `f[t] = logsumexp_c z[t,c]` is the marginal over classes. A label of -1, or None, stands for
    the marginal.

    See also `cdm_loss`, the training loss, `sample`, and the base class `Energy`.

    Args:
        network: any module from (B, ...) to logits (B, L), or (B, (L-1) K + 1) joint ones. An
            `AdjointNetwork` such as `UNet` or `MLP` takes the fast path without autograd; any other is
            differentiated by `torch.func`.
        schedule: the noise levels.
        level_prior: (L,) prior p(t) in training, up to a factor: the distribution of the levels times any
            per-level weight of the cross-entropy. Uniform by default. A wrong prior shifts every
            log-likelihood by a constant per level, so the prior is saved with the weights.
        input_shape: shape of one input; by default `network.input_shape`, if there is one.
        class_prior: (K,) frequency of each class among the labelled training data, up to a factor. Uniform
            over `network.num_classes` by default. With joint logits a wrong prior shifts the log-likelihood
            of each class by a constant, and so every class posterior; it is saved too.
        conditioning: "embedding" or "joint"; the network's own by default.

    Raises:
        UserError: a prior of the wrong length or with a value that is not positive and finite, or joint
            logits with an unknown number of classes.

    >>> from cdm_fast import CDM, MLP, NoiseSchedule
    >>> schedule = NoiseSchedule.uniform(T=10)
    >>> model = CDM(MLP(2, schedule.num_levels, hidden=8), schedule)
    >>> x = torch.zeros(3, 2)
    >>> model.log_posterior(x).shape, model.denoise(x, level=5).shape, model.log_prob(x).shape
    (torch.Size([3, 12]), torch.Size([3, 2]), torch.Size([3]))
    """

    log_level_prior: Tensor
    log_class_prior: Tensor | None
    class_constants: Tensor | None

    def __init__(
        self,
        network: nn.Module,
        schedule: NoiseSchedule,
        level_prior: Tensor | None = None,
        input_shape: tuple[int, ...] | None = None,
        class_prior: Tensor | None = None,
        conditioning: Conditioning | None = None,
    ) -> None:
        super().__init__(network, schedule, input_shape)
        if level_prior is None:
            level_prior = torch.ones(schedule.num_levels)
        self.register_buffer(
            "log_level_prior", normalised_log_prior(level_prior, "level", schedule.num_levels)
        )
        self.num_classes: int | None = getattr(network, "num_classes", None)
        own: Conditioning = getattr(network, "conditioning", "embedding")
        self.conditioning = conditioning or own
        if class_prior is not None and self.num_classes is None:
            self.num_classes = len(class_prior)
        if self.num_classes is not None and class_prior is None:
            class_prior = torch.ones(self.num_classes)
        self.register_buffer(
            "log_class_prior",
            None
            if class_prior is None
            else normalised_log_prior(class_prior, "class", self.num_classes or 0),
        )
        # (K+1, L) nats, added to the level logits of a class embedding given each class, the null class last.
        self.register_buffer("class_constants", None, persistent=False)
        if self.conditioning == "joint" and self.num_classes is None:
            raise UserError("joint logits, but how many classes? give class_prior, one number per class")

    @property
    def joint_classes(self) -> int:
        """K of joint logits, as `noise_level_ce` takes it; 1 if the logits do not depend on classes."""
        return self.num_classes or 1 if self.conditioning == "joint" else 1

    def logits(self, x: Tensor, label: Tensor | None = None) -> Tensor:
        """`f(x)`, (B, L); or the joint logits of all classes (B, (L-1) K + 1), whatever the label.

        Args:
            x: (B, ...).
            label: (B,) int64; -1 or None stands for no class.

        Raises:
            UserError: labels for a model without classes, or labels of the wrong shape or dtype.
        """
        if self.conditioning == "joint":
            self._check_labels(label, x)
            return self.network(x)
        return self.network(x) if label is None else self.network(x, label)

    def forward(self, x: Tensor, label: Tensor | None = None) -> Tensor:
        """The same as `logits`."""
        return self.logits(x, label)

    def level_logits(self, x: Tensor, label: Tensor | None = None) -> Tensor:
        """`log p(t | x)`, or with a label `log p(t | x, c)`, up to one constant per x: (B, L)."""
        return self._of_levels(self.logits(x, label), label)

    def _of_levels(self, logits: Tensor, label: Tensor | None) -> Tensor:
        """`level_logits`, computed from `logits`."""
        if self.conditioning == "embedding":
            if self.class_constants is None:
                return logits
            last = len(self.class_constants) - 1
            rows = self.class_constants[last:] if label is None else self.class_constants[label % (last + 1)]
            return logits + rows.to(logits.dtype)
        marginal = level_logits(logits, self.joint_classes)
        if label is None:
            return marginal
        index = label.clamp(min=0)[:, None].expand(-1, self.schedule.num_levels)[:, :, None]
        of_class = self._per_class(logits).gather(2, index).squeeze(2)
        return torch.where(label[:, None] >= 0, of_class, marginal)

    def log_posterior(self, x: Tensor, label: Tensor | None = None) -> Tensor:
        """`log p(t | x)` in nats for the prior p(t) of training, (B, L); with a label, `log p(t | x, c)`."""
        return level_logits(self.level_logits(x, label)).log_softmax(1)

    def draw_levels(self, num: int, generator: torch.Generator | None = None) -> Tensor:
        """(num,) int64 levels drawn from p(t)."""
        return torch.multinomial(self.log_level_prior.exp(), num, replacement=True, generator=generator)

    @property
    def _adjoint_network(self) -> AdjointNetwork | AutogradNetwork:
        """The network itself if it has an adjoint; otherwise its logits, differentiated by `torch.func`."""
        if isinstance(self.network, AdjointNetwork):
            return self.network
        return AutogradNetwork(self.logits, self.joint_classes if self.conditioning == "joint" else None)

    def ratio_gradient(
        self, x: Tensor, level: Tensor, label: Tensor | None = None, guidance: float = 0.0
    ) -> Tensor:
        """`grad_x F(x, level)`, like `x`; `level` (B,) int64; `guidance` for joint logits only."""
        return self._adjoint_network.ratio_gradient(x, level, label, guidance)

    def logits_and_ratio_gradient(
        self, x: Tensor, level: Tensor, label: Tensor | None = None, guidance: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """`(logits(x), grad_x F(x, level) like x)` from one evaluation; `guidance` for joint logits only."""
        return self._adjoint_network.logits_and_ratio_gradient(x, level, label, guidance)

    def logits_and_gradient_at(
        self, x: Tensor, label: Tensor | None = None, guidance: float = 0.0
    ) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """`logits(x)`, and `ratio_gradient` as a function of the level, from one evaluation."""
        return self._adjoint_network.logits_and_gradient_at(x, label, guidance)

    def cross_entropy_and_ratio_gradient(
        self, x: Tensor, level: Tensor, label: Tensor | None = None, other: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """The terms of the training loss: cross-entropy, logits of classes at the level, and gradient.

        Returns `-log p(level, label | x)` (B,) in nats, `z[level]` (B, K) and `grad_x F(x, level)` like `x`.
        The second is meaningless at pure noise, and None unless the logits are joint. Of a class embedding,
        given `other` (B,) int64, it is `log p_t(x|c) + log p(c)` up to a constant for each x, for c = `label`
        and c = `other`, (B, 2). That takes a second evaluation; all else takes one.
        """
        classes = self.joint_classes
        if classes >= MANY_CLASSES:
            return self._adjoint_network.cross_entropy_and_ratio_gradient(x, level, label)
        logits, grad_x = self.logits_and_ratio_gradient(x, level, label)
        if classes == 1:
            of_two = None
            if label is not None and other is not None:
                of_other = self.at_level_given(self.logits(x, other), level, other)
                of_two = torch.stack([self.at_level_given(logits, level, label), of_other], 1)
            return noise_level_ce(logits, level).loss, of_two, grad_x
        at_level = logits_at(logits, level, classes)
        return noise_level_ce(logits, level, label, classes).loss, at_level, grad_x

    def at_level_given(self, logits: Tensor, level: Tensor, label: Tensor) -> Tensor:
        """`log p_t(x|c) + log p(c)` up to a constant for each x, (B,), from the level logits given c.

        `level` and `label` (B,) int64, for a model with classes.
        """
        assert self.log_class_prior is not None
        logits = logits.to(compute_dtype(logits.dtype))
        ratio = logits.gather(1, level[:, None])[:, 0] - logits[:, -1]
        return ratio + self.log_class_prior[label].to(logits.dtype)

    def class_logits(self, x: Tensor, level: Tensor) -> Tensor:
        """`log p(c | x_t = x)` up to one constant per x, (B, K), in training; for joint logits only.

        `level` is (B,) int64, 0..T. Differentiable in the weights and in x, and cheaper than
        `log_class_posterior`, which computes the logits of all levels.
        """
        return self._adjoint_network.class_logits(x, level)

    def denoise(self, x: Tensor, level: int | Tensor, label: Tensor | None = None) -> Tensor:
        """`eps_hat = s (grad_x F + x)` (Thm 3.1), like `x`; arguments and errors as in `Denoiser.denoise`."""
        return self._eps_hat(x, level, label)

    def guided_denoise(self, x: Tensor, level: int | Tensor, label: Tensor, guidance: float) -> Tensor:
        """As in `Denoiser`; joint logits need one evaluation, of the scalar `(1 + w) z[t,c] - w f[t]`."""
        if self.conditioning == "embedding":
            return super().guided_denoise(x, level, label, guidance)
        return self._eps_hat(x, level, label, guidance)

    def _eps_hat(self, x: Tensor, level: int | Tensor, label: Tensor | None, guidance: float = 0.0) -> Tensor:
        level = self.schedule.levels(level, x)
        return denoise_epilogue(self.ratio_gradient(x, level, label, guidance), x, self.s[level].to(x.dtype))

    def denoise_at_own_level(
        self,
        x: Tensor,
        level: int,
        label: Tensor | None = None,
        guidance: float = 0.0,
        credibility: float = 0.5,
    ) -> tuple[Tensor, Tensor]:
        """The credible level of each x nearest to `level`, (B,) int64, and `eps_hat` there, like `x`.

        The central `credibility` of `p(t|x)` among levels 1..T, all equally likely before, is credible. Both
        come from one evaluation, unless `guidance` is that of a class embedding.

        Args:
            x: (B, ...).
            level: 1..T, that of every x if it is credible.
            label: (B,) int64, or None.
            guidance: w of `guided_denoise`, which needs a label.
            credibility: 0..1; 0 for the median of `p(t|x)`.
        """

        def nearest(logits: Tensor) -> Tensor:
            log_prob = self._of_levels(logits, label) - self.log_level_prior.to(logits.dtype)
            posterior, outside = log_prob[:, 1:-1].double().softmax(1), (1 - credibility) / 2
            first = 1 + (posterior.cumsum(1) < outside).sum(1)
            last = self.schedule.T - (posterior.flip(1).cumsum(1) < outside).sum(1)
            return torch.full_like(first, level).clamp(first, last)

        if guidance and self.conditioning == "embedding":
            assert label is not None
            own = nearest(self.logits(x, label))
            return own, self.guided_denoise(x, own, label, guidance)
        logits, gradient = self.logits_and_gradient_at(x, label, guidance)
        own = nearest(logits)
        return own, denoise_epilogue(gradient(own), x, self.s[own].to(x.dtype))

    def predict_x0(self, x: Tensor, level: int | Tensor, label: Tensor | None = None) -> Tensor:
        """`x0_hat = (x - s eps_hat) / a`, like `x`; arguments and errors as in `Denoiser.predict_x0`."""
        level = self._levels_with_data(level, x)
        a, s = (table[level].to(x.dtype) for table in (self.a, self.s))
        return denoise_x0(self.ratio_gradient(x, level, label), x, a, s)

    def score(self, x: Tensor, level: int | Tensor, label: Tensor | None = None) -> Tensor:
        """`grad_x log p_t(x) = -(grad_x F + x)`, like `x`, at every level, 0 and T+1 included."""
        return -(self.ratio_gradient(x, self.schedule.levels(level, x), label) + x)

    def log_prob_levels(self, x: Tensor, *, label: Tensor | None = None) -> Tensor:
        """`log p_t(x)` in nats at every level, (B, L), in one pass; with a label, `log p_t(x|label)`.

        `log p_t(x) = f(x)[t] - f(x)[T+1] + log p(T+1)/p(t) + log N(x; 0, I)` (Thm 3.2)
        """
        return self._to_log_prob(self.level_logits(x, label), x)

    def log_prob_levels_and_score(
        self, x: Tensor, level: int | Tensor, label: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """`(log_prob_levels(x), score(x, level))` from one evaluation, as in `Energy`."""
        logits, grad_x = self.logits_and_ratio_gradient(x, self.schedule.levels(level, x), label)
        return self._to_log_prob(self._of_levels(logits, label), x), -(grad_x + x)

    def guided_log_prob_levels_and_score(
        self, x: Tensor, level: int | Tensor, label: Tensor, guidance: float
    ) -> tuple[Tensor, Tensor]:
        """As in `Energy`; joint logits need one evaluation, of the scalar `(1 + w) z[t,c] - w f[t]`."""
        if self.conditioning == "embedding":
            return super().guided_log_prob_levels_and_score(x, level, label, guidance)
        level = self.schedule.levels(level, x)
        logits, grad_x = self.logits_and_ratio_gradient(x, level, label, guidance)
        given, free = self._of_levels(logits, label), self._of_levels(logits, None)
        guided = (1 + guidance) * given - guidance * free
        return self._to_log_prob(guided, x), -(grad_x + x)

    def log_prob_classes(self, x: Tensor, level: int | Tensor = 0) -> Tensor:
        """`log p_t(x|c)` in nats for every class, (B, K): one pass with joint logits, K with embedding.

        `log p_t(x|c) = z[t,c] - z_N + log p(T+1) - log p(t) - log p(c) + log N(x; 0, I)`

        Raises UserError for a model without classes.
        """
        num_classes = self._require_classes()
        index = self.schedule.levels(level, x)[:, None]
        if self.conditioning == "embedding":
            labels = torch.arange(num_classes, device=x.device)[:, None].expand(-1, x.shape[0])
            each = [self.log_prob_levels(x, label=c).gather(1, index)[:, 0] for c in labels]
            return torch.stack(each, dim=1)
        log_prob = self._to_log_prob(self._per_class(self.logits(x)), x)  # (B, L, K)
        return log_prob.gather(1, index[:, :, None].expand(-1, 1, num_classes)).squeeze(1)

    def log_prob_levels_each_and_pullback(
        self,
        x: Tensor,  # (B, ...)
    ) -> tuple[Tensor, Callable[[Tensor, Tensor], Tensor]]:
        """Log-densities of every class and of the marginal, and a function that combines their scores.

        Returns `log p_t(x|c)` in nats at every level, (B, L, K + 1), with `log p_t(x)` last; and a function
        from levels (B,) int64 and weights (B, K + 1) to the weighted sum of the scores, like `x`. Both come
        from one evaluation. For joint logits only.
        """
        logits, pull = self._adjoint_network.logits_and_pullback(x)
        classes = self.joint_classes
        each = torch.cat([self._per_class(logits), level_logits(logits, classes)[:, :, None]], dim=2)

        def weighted_score(level: Tensor, weight: Tensor) -> Tensor:
            share = logits_at(logits, level, classes).softmax(1)  # of the classes in all data
            gradient = pull(level, weight[:, :-1] + weight[:, -1:] * share)
            return -(gradient + weight.sum(1).view(-1, *[1] * (x.dim() - 1)) * x)

        return self._to_log_prob(each, x), weighted_score

    def log_class_posterior(
        self, x: Tensor, level: int | Tensor = 0, class_prior: Tensor | None = None
    ) -> Tensor:
        """`log p(c | x_t = x)` in nats by Bayes' rule, (B, K).

        Args:
            x: (B, ...).
            level: int or (B,) int64, the noise level of x.
            class_prior: (K,) up to a factor; by default the prior of training. `torch.ones(K)` is uniform.

        Raises:
            UserError: a model without classes, or a prior of the wrong length or not positive.
        """
        log_prior = self.log_class_prior
        if class_prior is not None:
            log_prior = normalised_log_prior(class_prior, "class", self._require_classes()).to(x.device)
        log_prob = self.log_prob_classes(x, level)
        return (log_prob + log_prior.to(log_prob.dtype)).log_softmax(1)  # type: ignore[union-attr]

    def classify(self, x: Tensor, level: int | Tensor = 0, class_prior: Tensor | None = None) -> Tensor:
        """The most probable class, (B,) int64; arguments as in `log_class_posterior`."""
        return self.log_class_posterior(x, level, class_prior).argmax(1)

    def _require_classes(self) -> int:
        if self.num_classes is None:
            raise UserError(
                "this model was trained without classes: train with --conditioning joint or embedding"
            )
        return self.num_classes

    def _check_labels(self, label: Tensor | None, x: Tensor) -> None:
        check_labels(label, self.num_classes, x.shape[0])

    def _per_class(self, logits: Tensor) -> Tensor:
        """(B, L, K): `log p(t | x, c)` up to one constant per x and c, from joint logits."""
        z = logits.to(torch.promote_types(logits.dtype, torch.float32))
        joint = z[:, :-1].unflatten(1, (-1, self.joint_classes))
        joint = joint - self.log_class_prior.to(z.dtype)  # type: ignore[union-attr]
        return torch.cat([joint, z[:, -1:, None].expand(-1, -1, self.joint_classes)], dim=1)

    def _to_log_prob(self, logits: Tensor, x: Tensor) -> Tensor:
        """Thm 3.2 for level logits (B, L), or for those of n densities (B, L, n)."""
        prior = self.log_level_prior.to(logits.dtype)
        each = (slice(None), *[None] * (logits.dim() - 2))
        normal = log_normal(x)[:, None].to(logits.dtype)
        return logits - logits[:, -1:] + (prior[-1] - prior)[each] + normal[:, *each]


def normalised_log_prior(prior: Tensor, of: str, count: int) -> Tensor:
    """`log(prior / sum(prior))` (count,) float64, of levels or classes: `of` is "level" or "class".

    Raises UserError for another length, and for a value that is not positive and finite.
    """
    prior = torch.as_tensor(prior, dtype=torch.float64)
    if prior.shape != (count,):
        number = "the schedule has" if of == "level" else "there are"
        noun = "levels" if of == "level" else "classes"
        raise UserError(f"{of}_prior has shape {tuple(prior.shape)}: {number} {count} {noun}")
    if not bool((torch.isfinite(prior) & (prior > 0)).all()):
        raise UserError(f"{of}_prior must be positive and finite at every {of}")
    return (prior / prior.sum()).log()


def require_likelihood(model: Denoiser) -> CDM:
    """The model itself; UserError unless it is a `CDM`, the only model with a single-pass likelihood."""
    if not isinstance(model, CDM):
        kind = "plain denoising model (DDM)" if isinstance(model, DDM) else "classifier"
        raise UserError(f"this is a {kind}, which has no likelihood: train with --objective cdm")
    return model
