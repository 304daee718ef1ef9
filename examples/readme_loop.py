"""The loop of the README: one mixed op between two layers, weight steps and arch steps in turns."""

import torch

import proxyless_fast as pf


def main(steps: int = 10) -> None:
    torch.manual_seed(0)
    candidates = {"k3": pf.MBConv(16, 16, 3), "k7": pf.MBConv(16, 16, 7), "zero": pf.Zero()}
    op = pf.MixedOp(candidates, label="block3")
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3), op, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    weights = torch.optim.SGD(pf.weight_parameters(net), lr=0.05)
    alphas = torch.optim.Adam(pf.arch_parameters(net), lr=0.01, betas=(0.0, 0.999))
    x, y = torch.randn(8, 3, 32, 32), torch.randint(0, 16, (8,))

    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        pf.sample(net, "path", generator)  # a weight step: one candidate runs
        weights.zero_grad()
        torch.nn.functional.cross_entropy(net(x), y).backward()
        weights.step()

        pf.sample(net, "full", generator)  # an arch step: the others are probed in backward
        alphas.zero_grad()
        torch.nn.functional.cross_entropy(net(x), y).backward()
        alphas.step()

    print("probabilities:", dict(zip(op.names, op.probabilities().tolist(), strict=True)))
    print("derived:", pf.derive(net))


if __name__ == "__main__":
    main()
