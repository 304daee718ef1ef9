"""Steps of a user's own: what they may return, and that batches of any structure go through in parts."""

import pytest
import torch
from torch import nn

import proxyless_fast as pf


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.mixed = pf.MixedOp({"a": nn.Linear(3, 2), "b": nn.Linear(3, 2)}, label="mixed")

    def forward(self, x):
        return self.mixed(x)


def batches(structure=lambda x, y: (x, y), count=2, size=5):
    random = torch.Generator().manual_seed(0)
    draw = [torch.randn(size, 3, generator=random) for _ in range(count)]
    return [structure(x, x[:, :2] + 1) for x in draw]


def as_dicts(x, y):
    return {"x": x, "targets": [{"y": row} for row in y]}


def of_dicts(net, batch):
    wanted = torch.stack([target["y"] for target in batch["targets"]])
    loss = (net(batch["x"]) - wanted).square().mean()
    return loss, {"score": -loss.detach()}


def search_of(step=None, structure=lambda x, y: (x, y), loss=None, metric=None, **config):
    torch.manual_seed(0)
    settings = {"epochs": 2, "warmup_epochs": 0, "arch_every": 1, "log_every": 1, "lr": 0.1, **config}
    train, valid = batches(structure), batches(structure)
    return pf.Search(Net(), train, valid, pf.SearchConfig(**settings), step=step, loss=loss, metric=metric)


def test_a_step_in_parts_is_the_step_of_the_whole():
    whole, parts = (search_of(of_dicts, as_dicts, accumulate=n).fit() for n in (1, 2))
    for a, b in zip(whole.net.parameters(), parts.net.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)
    assert parts.history[-1]["weight_score"] == pytest.approx(whole.history[-1]["weight_score"], abs=1e-6)
    assert parts.history[-1]["weight_score"] > parts.history[0]["weight_score"]


def test_loss_and_metric_are_a_step():
    def distance(outputs, targets):
        return -(outputs - targets).square().mean().detach()

    of_two = search_of(loss=nn.functional.mse_loss, metric=distance).fit()
    of_one = search_of(of_dicts, as_dicts).fit()
    for a, b in zip(of_two.net.parameters(), of_one.net.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)
    assert of_two.history[-1]["weight_distance"] == pytest.approx(of_one.history[-1]["weight_score"], abs=1e-6)


def test_the_first_of_what_is_measured_is_the_reward():
    search = search_of(lambda net, batch: (net(batch[0]).mean(), {"score": 0.25, "other": 9.0}), mode="reinforce").fit()
    assert search.history[-1]["arch_reward"] == 0.25


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        (lambda loss: loss, r"step: returned a Tensor, expected \(loss, \{name: scalar, \.\.\.\}\)"),
        (lambda loss: (loss, {}), "step: returned a tuple, expected"),
        (lambda loss: (loss, {"a": 1.0}, 3), "step: returned a tuple, expected"),
        (lambda loss: (loss.item(), {"a": 1.0}), "loss: got a float, expected a tensor of one number"),
        (lambda loss: (loss.expand(4), {"a": 1.0}), r"loss: got a tensor of shape \(4,\), expected"),
        (lambda loss: (loss, {"a": loss.expand(4)}), r"a: got a tensor of shape \(4,\), expected one number"),
        (lambda loss: (loss, {"a": "b"}), "a: got a str, expected one number"),
        (lambda loss: (loss, {"lr": loss}), "step: measured 'lr', which the log has of its own, expected another name"),
    ],
)
def test_a_step_that_returns_something_else_is_told(returned, said):
    with pytest.raises(ValueError, match=said):
        search_of(lambda net, batch: returned(net(batch[0]).mean())).fit()


def test_a_loss_of_each_image_is_told():
    with pytest.raises(ValueError, match=r"loss: got a tensor of shape \(5, 2\), expected a tensor of one number"):
        search_of(loss=lambda outputs, targets: (outputs - targets).square(), metric=lambda *_: 0.0).fit()


def test_a_step_and_a_loss_are_refused():
    with pytest.raises(ValueError, match="step: got it with a loss or a metric"):
        search_of(of_dicts, as_dicts, loss=nn.functional.mse_loss)


def test_a_loss_that_is_not_finite_is_told_for_a_batch_of_any_structure():
    def step(net, batch):
        loss, measured = of_dicts(net, batch)
        return loss * torch.nan, measured

    with pytest.raises(pf.search.NonFiniteLoss, match="loss: got nan at weight step 0"):
        search_of(step, as_dicts).fit()
