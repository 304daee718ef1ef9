"""A MixedOp over modules of your own, in a network of your own: here the heads and widths of a small transformer.

The engine's fast paths are for MBConv; a mixed op takes any module. A candidate that can do more than run may offer
it: `proxyless_fast/candidates.py` says what.
"""

import torch
from torch import Tensor, nn

import proxyless_fast as pf

DIM, TOKENS, CLASSES = 32, 12, 4


class FeedForward(nn.Sequential):
    """x (B, T, DIM) to the same shape, through `wide` hidden units."""

    def __init__(self, wide: int):
        super().__init__(nn.LayerNorm(DIM), nn.Linear(DIM, wide), nn.GELU(), nn.Linear(wide, DIM))


class Attention(nn.Module):
    """x (B, T, DIM) to the same shape, by `heads` heads."""

    def __init__(self, heads: int):
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(DIM), nn.MultiheadAttention(DIM, heads, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(*[self.norm(x)] * 3, need_weights=False)[0]


class Net(nn.Module):
    """Two residual layers whose operations are searched, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = pf.MixedOp({f"{h} heads": Attention(h) for h in (1, 4)} | {"none": pf.Zero()}, label="mix")
        self.feed = pf.MixedOp({f"{w} wide": FeedForward(w) for w in (16, 64)} | {"none": pf.Zero()}, label="feed")
        self.head = nn.Linear(DIM, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mix(x)
        return self.head((x + self.feed(x)).mean(1))


if __name__ == "__main__":
    torch.manual_seed(0)
    net = Net()
    x, y = torch.randn(64, TOKENS, DIM), torch.randint(0, CLASSES, (64,))
    weights, alphas = torch.optim.Adam(pf.weight_parameters(net)), torch.optim.Adam(pf.arch_parameters(net))
    for step in range(20):
        for mode, optimizer in (("path", weights), ("full", alphas)):
            pf.sample(net, mode, torch.Generator().manual_seed(step))
            net.zero_grad()
            nn.functional.cross_entropy(net(x), y).backward()
            optimizer.step()
    print({label: op.names[op.most_likely] for label, op in pf.mixed_ops(net).items()})
    print(pf.derive(net))
