"""The paper's network and training step as anyone would write them: the baseline and the oracle.

Plain modules, materialised attention, cumulated logits, and the denoiser by autograd through autograd. The
parameters have the same names as `cdm_fast.UNet`, so the two load each other's state_dict.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def norm(channels: int, groups: int) -> nn.GroupNorm:
    return nn.GroupNorm(groups, channels, eps=1e-6)


class Block(nn.Module):
    def __init__(self, before: int, after: int, groups: int, dropout: float, embedding: int | None) -> None:
        super().__init__()
        self.norm1, self.conv1 = norm(before, groups), nn.Conv2d(before, after, 3, padding=1)
        if embedding:
            self.temb_proj = nn.Linear(embedding, after)
        self.norm2, self.conv2 = norm(after, groups), nn.Conv2d(after, after, 3, padding=1)
        self.dropout = nn.Dropout(dropout)
        if before != after:
            self.nin_shortcut = nn.Conv2d(before, after, 1)

    def forward(self, x: Tensor, emb: Tensor | None) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        if emb is not None:
            h = h + self.temb_proj(F.silu(emb))[:, :, None, None]
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class Attention(nn.Module):
    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = norm(channels, groups)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (layer(h).flatten(2) for layer in (self.q, self.k, self.v))
        weights = torch.softmax(q.transpose(1, 2) @ k * x.shape[1] ** -0.5, dim=2)
        return x + self.proj_out((v @ weights.transpose(1, 2)).view_as(x))


class Down(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Up(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class PlainUNet(nn.Module):
    def __init__(
        self,
        image_size: int,
        channels: int,
        num_levels: int,
        base_channels: int = 128,
        multipliers: tuple[int, ...] = (1, 2, 2, 2),
        blocks_per_level: int = 2,
        attention_resolutions: tuple[int, ...] = (16,),
        dropout: float = 0.0,
        num_classes: int | None = None,
        num_groups: int = 32,
    ) -> None:
        super().__init__()
        base, groups, self.num_classes = base_channels, num_groups, num_classes
        embedding = None
        if num_classes is not None:
            embedding = 4 * base
            self.label_emb = nn.Embedding(num_classes + 1, base)
            self.temb = nn.Module()
            self.temb.dense = nn.ModuleList([nn.Linear(base, embedding), nn.Linear(embedding, embedding)])
        self.conv_in = nn.Conv2d(channels, base, 3, padding=1)
        self.down, self.up, skips, size, width = nn.ModuleList(), nn.ModuleList(), [base], image_size, base
        for i, multiplier in enumerate(multipliers):
            down = nn.Module()
            down.block, down.attn = nn.ModuleList(), nn.ModuleList()
            for _ in range(blocks_per_level):
                down.block.append(Block(width, base * multiplier, groups, dropout, embedding))
                width = base * multiplier
                if size in attention_resolutions:
                    down.attn.append(Attention(width, groups))
                skips.append(width)
            if i < len(multipliers) - 1:
                down.downsample = Down(width)
                skips.append(width)
                size //= 2
            self.down.append(down)
        self.mid = nn.Module()
        self.mid.block_1 = Block(width, width, groups, dropout, embedding)
        self.mid.attn_1 = Attention(width, groups)
        self.mid.block_2 = Block(width, width, groups, dropout, embedding)
        for i, multiplier in reversed(list(enumerate(multipliers))):
            up = nn.Module()
            up.block, up.attn = nn.ModuleList(), nn.ModuleList()
            for _ in range(blocks_per_level + 1):
                up.block.append(Block(width + skips.pop(), base * multiplier, groups, dropout, embedding))
                width = base * multiplier
                if size in attention_resolutions:
                    up.attn.append(Attention(width, groups))
            if i > 0:
                up.upsample = Up(width)
                size *= 2
            self.up.insert(0, up)
        self.norm_out, self.conv_out = norm(width, groups), nn.Conv2d(width, 2 * base, 3, padding=1)
        self.linear_layer = nn.Linear(2 * base, num_levels)

    def forward(self, x: Tensor, label: Tensor | None = None) -> Tensor:
        emb = None
        if self.num_classes is not None:
            label = torch.full((len(x),), self.num_classes, device=x.device) if label is None else label
            emb = self.temb.dense[1](F.silu(self.temb.dense[0](self.label_emb(label))))
        h = self.conv_in(x)
        skips = [h]
        for down in self.down:
            for j, block in enumerate(down.block):
                h = block(h, emb)
                h = down.attn[j](h) if len(down.attn) else h
                skips.append(h)
            if hasattr(down, "downsample"):
                h = down.downsample(h)
                skips.append(h)
        h = self.mid.block_2(self.mid.attn_1(self.mid.block_1(h, emb)), emb)
        for up in reversed(self.up):
            for j, block in enumerate(up.block):
                h = block(torch.cat([h, skips.pop()], dim=1), emb)
                h = up.attn[j](h) if len(up.attn) else h
            h = up.upsample(h) if hasattr(up, "upsample") else h
        h = self.conv_out(F.silu(self.norm_out(h))).mean(dim=(2, 3))
        return self.linear_layer(h).cumsum(dim=1)


def double_backward_loss(
    network: nn.Module,
    x_t: Tensor,
    eps: Tensor,
    s_t: Tensor,  # (B, 1, 1, 1)
    level: Tensor,
    label: Tensor | None = None,
    ce_weight: float = 1e-3,
) -> Tensor:
    """The loss of Alg. 1 with the denoiser taken by `autograd.grad(create_graph=True)`."""
    x_t = x_t.requires_grad_()
    logits = network(x_t) if label is None else network(x_t, label)
    ratio = logits[:, -1] - logits.gather(1, level[:, None])[:, 0]
    (grad_x,) = torch.autograd.grad(ratio.sum(), x_t, create_graph=True)
    eps_hat = s_t * (grad_x + x_t)
    return ce_weight * F.cross_entropy(logits, level) + (eps_hat - eps).square().mean()
