"""The interface of networks with an explicit adjoint: features, their adjoint, and a head over noise levels.

# B batch, D features, L = T+2 noise levels, K classes, N = L logits, or (L-1) K + 1 joint ones (`heads.py`)
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from cdm_fast.nn.base import MixtureBase
from cdm_fast.nn.heads import ClassHead, Conditioning, CumulativeHead, PlainHead, class_weights
from cdm_fast.ops import noise_level_ce


class AdjointNetwork(nn.Module):
    """A noise-level classifier `f = head(features(x))` whose input gradient is a forward computation.

    Subclasses provide `features`, `adjoint`, `linear_layer` (the head) and `input_shape`. With a `ClassHead`
    the label does not enter the trunk; it selects among the logits.

    `network.base = MixtureBase(...)` adds the logits of a base to those of the head. `features` and `adjoint`
    are those of the network alone.
    """

    linear_layer: CumulativeHead
    input_shape: tuple[int, ...]
    num_classes: int | None
    conditioning: Conditioning

    @property
    def base(self) -> MixtureBase | None:
        """The base to whose logits those of the head are added, if there is one."""
        return self._modules.get("base")  # type: ignore[return-value]

    @base.setter
    def base(self, base: MixtureBase | None) -> None:
        self.add_module("base", base)

    def features(
        self, x: Tensor, label: Tensor | None = None, keep_residuals: bool = True
    ) -> tuple[Tensor, Any]:
        """`x` (B, *input_shape) -> features (B, D), and (if kept) the residuals that `adjoint` needs."""
        raise NotImplementedError

    def adjoint(self, residuals: Any, g: Tensor) -> Tensor:
        """Gradient of `<g, features(x)>` with respect to `x`; `g` (B, D)."""
        raise NotImplementedError

    def forward(self, x: Tensor, label: Tensor | None = None) -> Tensor:
        """Logits (B, N): `f(x)[t] = log p(t | x)`, or jointly `log p(t, c | x)`, up to one constant per x."""
        logits = self.linear_layer(self.features(x, label, keep_residuals=False)[0])
        return logits if self.base is None else logits + self.base.logits(self.base.read(x))

    def ratio_gradient(
        self, x: Tensor, level: Tensor, label: Tensor | None = None, guidance: float = 0.0
    ) -> Tensor:
        """`grad_x (f(x)[T+1] - f(x)[level])`, like `x`. `level` (B,) int64.

        A head over classes computes only the logits of that level and selects the label's; for `guidance`
        see `ClassHead.cotangent`. A head over levels needs no logits and does not support `guidance`.
        """
        head = self.linear_layer
        h, residuals = self._features(x, label)
        cumulated, base = head.cumulated(), self.base
        if base is None:
            return self.adjoint(residuals, head.cotangent(h, cumulated, level, label, guidance))
        read = base.read(x)
        at_level = None
        if isinstance(head, ClassHead):
            at_level = head.at_level(h, cumulated, level) + base.at_level(read, level)
        cotangent = head.cotangent(h, cumulated, level, label, guidance, at_level)
        weights = _class_weights(at_level, label, guidance)
        return _plus(self.adjoint(residuals, cotangent), base.gradient(read, level, weights))

    def logits_and_ratio_gradient(
        self, x: Tensor, level: Tensor, label: Tensor | None = None, guidance: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """Logits (B, N) and `ratio_gradient` from one evaluation of the features; the same arguments."""
        logits, gradient = self.logits_and_gradient_at(x, label, guidance)
        return logits, gradient(level)

    def logits_and_gradient_at(
        self, x: Tensor, label: Tensor | None = None, guidance: float = 0.0
    ) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """Logits (B, N), and the `ratio_gradient` of levels (B,) as a function, from the same features.

        The levels may depend on the logits.
        """
        head, base = self.linear_layer, self.base
        h, residuals = self._features(x, label)
        cumulated = head.cumulated()
        logits = head.logits(h, *cumulated)
        read = None
        if base is not None:
            read = base.read(x)
            logits = logits + base.logits(read)

        def gradient(level: Tensor) -> Tensor:
            at_level = head.pick(logits, level)
            cotangent = head.cotangent(h, cumulated, level, label, guidance, at_level)
            of_network = self.adjoint(residuals, cotangent)
            if base is None or read is None:
                return of_network
            weights = _class_weights(at_level, label, guidance)
            return _plus(of_network, base.gradient(read, level, weights))

        return logits, gradient

    def logits_and_pullback(self, x: Tensor) -> tuple[Tensor, Callable[[Tensor, Tensor], Tensor]]:
        """Joint logits (B, N), and a function that pulls class weights back to the input.

        `pull(level (B,), weight (B, K))` is `grad_x sum_c weight[c] (z_N - z[level, c])`, like `x`, from the
        same features; the weights may depend on the logits. For heads over classes only.
        """
        head, base = self._class_head(), self.base
        h, residuals = self.features(x)
        weight, bias = head.cumulated()
        logits = head.logits(h, weight, bias)

        read = None
        if base is not None:
            read = base.read(x)
            logits = logits + base.logits(read)

        def pull(level: Tensor, class_weight: Tensor) -> Tensor:
            cotangent = head.weighted_cotangent(weight, level, class_weight.to(weight))
            of_network = self.adjoint(residuals, cotangent)
            if base is None or read is None:
                return of_network
            return _plus(of_network, base.gradient(read, level, class_weight))

        return logits, pull

    def cross_entropy_and_ratio_gradient(
        self, x: Tensor, level: Tensor, label: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The cross-entropy (B,) in nats, the logits (B, K) of each input's own level, and `ratio_gradient`.

        Without a base it never holds all joint logits at once, which matters for many classes. For heads over
        classes only.
        """
        head = self._class_head()
        if self.base is not None:
            logits, gradient = self.logits_and_gradient_at(x, label)
            loss = noise_level_ce(logits, level, label, head.num_classes).loss
            return loss, head.pick(logits, level), gradient(level)
        h, residuals = self.features(x)
        cumulated = head.cumulated()
        loss = head.cross_entropy(h, cumulated, level, label)
        at_level = head.at_level(h, cumulated, level)
        cotangent = head.cotangent(h, cumulated, level, label, at_level=at_level)
        return loss, at_level, self.adjoint(residuals, cotangent)

    def class_logits(self, x: Tensor, level: Tensor) -> Tensor:
        """`z(x)[level]` (B, K), without the logits of other levels; `level` (B,) int64, 0..T.

        For heads over classes only.
        """
        head, base = self._class_head(), self.base
        at_level = head.at_level(self.features(x, keep_residuals=False)[0], head.cumulated(), level)
        return at_level if base is None else at_level + base.at_level(base.read(x), level)

    def _features(self, x: Tensor, label: Tensor | None) -> tuple[Tensor, Any]:
        """`features` of `x`, and of the label if it enters the trunk."""
        return self.features(x, None if self.linear_layer.takes_label else label)

    def _class_head(self) -> ClassHead:
        assert isinstance(self.linear_layer, ClassHead), "needs a head over (level, class) pairs"
        return self.linear_layer


def _class_weights(at_level: Tensor | None, label: Tensor | None, guidance: float) -> Tensor | None:
    """`class_weights`, or None for a head over levels."""
    return None if at_level is None else class_weights(at_level, label, guidance)


def _plus(gradient: Tensor, of_base: Tensor) -> Tensor:
    """The gradient of the network, like x, plus that of the base (B, d), in the former's layout and dtype."""
    return gradient + of_base.view(gradient.shape).to(gradient.dtype)


def as_classifier(network: AdjointNetwork) -> AdjointNetwork:
    """The network as an ordinary classifier of images: (B, ...) -> (B, K) logits of classes.

    network: of K levels and without classes; its head is replaced by one that cumulates nothing, with the
        same initial weights.
    """
    levels = network.linear_layer
    network.linear_layer = PlainHead(levels.in_features, levels.out_features)
    network.linear_layer.load_state_dict(levels.state_dict())
    network.num_classes = levels.out_features
    return network
