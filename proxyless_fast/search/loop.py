"""The search: weights on training data, alphas on validation data, in turns (paper section 3.2)."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..distributed.ranks import Ranks, digest
from ..latency import ExpectedLatency, LatencyTable
from ..supernet import ActiveParameters, arch_parameters, frozen, mixed_ops, rescale, sample, weight_parameters
from . import checkpoint
from .agreement import require_agreement, require_images, require_own_batches, share_out
from .batches import endless_batches, epoch_batches, generator
from .checkpoint import Checkpoints
from .config import SearchConfig
from .diagnose import require_finite, require_finite_gradients
from .objectives import objective
from .optim import adam, cosine_of, optimizer_of, set_lr
from .parts import count_images, to_device
from .recipe import mix_of
from .reinforce import log_probability, reward, surrogate, update_baseline
from .session import Session
from .steps import Backward, Measured, Step, score_dtype, step_of


class Search(Session):
    """A search over the mixed ops of any module; `fit()` runs it.

    net: maps a batch of inputs to logits (B, classes); trained in place, on the device its parameters are on.
    train, valid: sized iterables of (inputs, labels) batches, of disjoint splits; `set_epoch(n)` of the loader or of
        its sampler is called where there is one, and makes a resume exact even within an epoch.
    config: SearchConfig.
    table: a LatencyTable, for a net with `layers()`; or any object that returns E[lat] in ms, a differentiable scalar,
        when called and has `of_choices({label: index}) -> ms`; None: no latency term.
    out: folder for search.jsonl, tensorboard/ and checkpoints/, without those of another search; None: nothing is
        written.
    checkpoints: when to save beside epochs' ends and stops; default: every 10 minutes, and the last 3 are kept.

    Other tasks than classification give one or more of these:

    loss, metric: (outputs, targets) -> scalar, means over images; default: cross-entropy (smoothed by the config in
        weight steps) and top-1, which is also the accuracy of REINFORCE's reward.
    step: (net, batch) -> (loss, {name: scalar}), in place of both, for batches of any structure; the first of what is
        named is the score.
    weight_optimizer, arch_optimizer: a list of parameters to an optimizer; default: the config's.
    schedule: (step, total steps) -> learning rate of the weights; default: the config's warm-up and cosine.

    In each process of torch.distributed's default group it is one search of all: each step's batch is that of all
    processes together, and weights and alphas stay the same. Loaders of this package share out their batches; others
    must give each process its own part, as torch's DistributedSampler does. Rank 0 writes.

    `history` gets a dict of means after each epoch. Raises ValueError where the net has no mixed op, a loader is empty,
    its images or classes are not the net's, the target does not suit the table, or the folder holds checkpoints, and
    NonFiniteLoss (a ValueError) where a loss or a gradient is NaN or infinite; LostRank (a RuntimeError) where another
    process has ended.
    """

    kind = "search"
    resumed_by = "Search.resume({out!r}, ...) or `proxyless-fast search --resume`"

    def __init__(
        self,
        net: nn.Module,
        train: Any,
        valid: Any,
        config: SearchConfig | None = None,
        table: Any = None,
        out: str | Path | None = None,
        *,
        checkpoints: Checkpoints | None = None,
        loss: Callable[[Any, Any], Tensor] | None = None,
        metric: Callable[[Any, Any], Tensor] | None = None,
        step: Step | None = None,
        weight_optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None = None,
        arch_optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None = None,
        schedule: Callable[[int, int], float] | None = None,
    ) -> None:
        self.net, self.train, self.valid = net, train, valid
        self.config = config = config or SearchConfig()
        self.ops = mixed_ops(net)
        if not self.ops:
            raise ValueError(f"net: {type(net).__name__} has no MixedOp, expected at least one to search")
        for name, loader in (("train", train), ("valid", valid)):
            if len(loader) == 0:
                raise ValueError(f"{name}: got a loader of 0 batches, expected at least one")
            require_agreement(net, loader, name)
        self.latency = ExpectedLatency(net, table) if isinstance(table, LatencyTable) else table
        self._check_target()
        self.weights, self.alphas = list(weight_parameters(net)), list(arch_parameters(net))
        self.device = self.weights[0].device if self.weights else self.alphas[0].device
        self.ranks = ranks = Ranks.current()
        # Samples of REINFORCE go to the processes, each of which then needs the whole batch.
        self.spread = ranks.several and config.mode == "reinforce" and not config.sync_norm
        share_out(train, ranks)
        if not self.spread:
            share_out(valid, ranks)
        ranks.broadcast(net)
        self.weight_loss = step_of(step, loss, metric, config.label_smoothing)
        self.arch_loss = step_of(step, loss, metric)
        self.active = ActiveParameters(net)
        self.mix = mix_of(config, net, train, ranks)
        self.backward = Backward(self.weights, ranks, self.device, config.precision, config.accumulate)
        self.schedule = schedule or cosine_of(config, train, ranks)
        self.weight_optimizer = (
            weight_optimizer(self.weights) if weight_optimizer else optimizer_of(config, self.weights)
        )
        self.arch_optimizer = (
            arch_optimizer(self.alphas)
            if arch_optimizer
            else adam(self.alphas, config.arch_lr, config.arch_weight_decay)
        )
        self.baseline: Tensor | None = None
        self._begun = False
        epochs = config.warmup_epochs + config.epochs
        super().__init__({"train": train, "valid": valid}, epochs, out, checkpoints)

    def weight_step(self, batch: Any, requests: Sequence[float] = ()) -> list[float]:
        """One step of the weights of a sampled path. Only its parameters get a gradient, momentum and decay.

        requests: numbers that are added up over the processes on the way; returns their sums.
        """
        lr = self.schedule(self.step, self.total_steps)
        set_lr(self.weight_optimizer, lr)
        if self.ranks.several and not self._begun:
            require_own_batches(batch, "train", self.ranks)
        self._begun = True
        if self.mix is not None:
            batch = self.mix(self.seed, self.step, to_device(batch, self.device))
        weights, own = self._sample("path", "weight")
        self.weight_optimizer.zero_grad(set_to_none=True)
        with frozen(self.alphas):
            measured = self.backward(batch, self._weight_loss, weights, own, requests=requests)
        self._require_finite_gradients(self.weights, "weight")
        self.backward.update(self.weight_optimizer, self.config.clip_norm)
        self.journal.add(self.step, "weight", **measured, lr=lr)
        return self.backward.requested

    def arch_step(self, batch: Any) -> None:
        """One Adam step of the alphas; weights are frozen, so backward computes gradients of activations only."""
        self.arch_optimizer.zero_grad(set_to_none=True)
        with frozen(self.weights):
            if self.config.mode == "reinforce":
                measured = self._reinforce_gradient(to_device(batch, self.device))
            else:
                self._sample(self.config.mode, "arch")
                measured = self.backward(batch, self._arch_loss, alphas=self.alphas)
        self._require_finite_gradients(self.alphas, "arch")
        self.backward.update(self.arch_optimizer)
        if self.config.mode == "two":
            rescale(self.net)
        self.journal.add(self.step, "arch", **measured, entropy=self.entropy())

    def _weight_loss(self, batch: Any) -> tuple[Tensor, Measured]:
        self._require_images(batch, "train")
        loss, measured = self.weight_loss(self.net, batch)
        self._require_finite(loss, batch, "weight")
        return loss, {"loss": loss, **measured}

    def _arch_loss(self, batch: Any) -> tuple[Tensor, Measured]:
        self._require_images(batch, "valid")
        loss, measured = self.arch_loss(self.net, batch)
        measured = {"ce": loss, **measured}
        if self.latency is not None:
            c = self.config
            measured["latency"] = self.latency()
            ref, factor, exponent = c.target_ms or 0.0, c.mul_log_factor, c.mul_log_exponent
            loss = objective(loss, measured["latency"], ref, c.objective, factor, exponent, c.add_linear_weight)
        self._require_finite(loss, batch, "arch", measured.get("latency"))
        return loss, {"loss": loss, **measured}

    def _reinforce_gradient(self, batch: Any) -> Measured:
        self._require_images(batch, "valid")
        draws = generator(self.config.seed, self.step, "arch")
        log_p, scores, latencies = [], [], []
        for number in range(self.config.samples):
            sample(self.net, "path", generator=draws)
            scores.append(self._score(batch, number))
            choices = {label: op.active for label, op in self.ops.items()}
            latencies.append(None if self.latency is None else self.latency.of_choices(choices))
            log_p.append(log_probability(self.ops.values()))
        scores = self._scores_of_all(scores, count_images(batch))
        target, exponent = self.config.target_ms, self.config.reward_exponent
        rewards = [reward(score, ms, target, exponent) for score, ms in zip(scores, latencies, strict=True)]
        stacked = torch.stack(rewards)
        self.backward.scaler.scale(surrogate(torch.stack(log_p), stacked, self.baseline)).backward()
        self.baseline = update_baseline(self.baseline, stacked, self.config.baseline_momentum)
        measured = {"reward": stacked.mean(), getattr(self.arch_loss, "name", "score"): torch.stack(scores).mean()}
        return measured if self.latency is None else {**measured, "latency": self.latency().detach()}

    @torch.no_grad()
    def _score(self, batch: Any, number: int) -> Tensor:
        """The score of the active path; zero where the sample of this number is another process's."""
        if self.spread and number % self.ranks.size != self.ranks.rank:
            return torch.zeros((), device=self.device, dtype=score_dtype(self.device))
        with self.backward.in_precision():
            _, measured = self.arch_loss(self.net, batch)
        return torch.as_tensor(next(iter(measured.values())), device=self.device).to(score_dtype(self.device))

    def _scores_of_all(self, scores: list[Tensor], images: int) -> list[Tensor]:
        """Scores as all processes have them: of the samples that each took, or of the images that each had."""
        if not self.ranks.several:
            return scores
        weight = 1 if self.spread else images
        *sums, total = self.ranks.start_sum([weight * float(score) for score in scores] + [weight]).wait()
        of_all = torch.tensor(sums, dtype=torch.float64) / (1 if self.spread else total)
        return list(of_all.to(self.device, score_dtype(self.device)))

    def _sample(self, mode: Any, draw: str) -> tuple[list[nn.Parameter], set[int] | None]:
        """Draws the path of this step. Returns the weights that take part in any process, and ids of those in this one
        where not all do; neither is asked for where there is one process."""
        own_path = self.config.paths == "own" and self.ranks.several
        sample(self.net, mode, generator=generator(self.config.seed, self.step, draw, self.ranks.rank * own_path))
        if not self.ranks.several:
            return [], None
        if not own_path:
            return self.active(), None
        paths = self.ranks.gather([op.active for op in self.ops.values()])
        return self.active(paths), {id(p) for p in self.active()}

    def batches(self, epoch: int, position: int) -> Iterator[tuple]:
        """A training batch of each step, and a validation batch where the step moves the alphas too, else None."""
        start = epoch * len(self.train)
        arch_batches = self._arch_batches(start, start + position)
        batches = self.waits.over(epoch_batches(self.train, epoch, position, self.seed), "train")
        for step, batch in enumerate(batches, start + position):
            yield batch, next(arch_batches) if self._arch_step_due(step) else None

    def run_step(self, batches: tuple, requests: Sequence[float]) -> list[float]:
        """A weight step, and where there is a batch for it an arch step."""
        batch, arch_batch = batches
        sums = self.weight_step(batch, requests)
        if arch_batch is not None:
            self.arch_step(arch_batch)
        return sums

    def entropy(self) -> Tensor:
        """Mean entropy of the mixed ops' probabilities, in nats."""
        return torch.stack([torch.special.entr(op.probabilities().detach()).sum() for op in self.ops.values()]).mean()

    def own_state(self) -> dict[str, Any]:
        return {
            "weight_optimizer": self.weight_optimizer.state_dict(),
            "arch_optimizer": self.arch_optimizer.state_dict(),
            "baseline": self.baseline,
        }

    def restore_own(self, state: Mapping[str, Any], path: Path) -> None:
        for name in ("weight_optimizer", "arch_optimizer"):
            checkpoint.load_optimizer(getattr(self, name), state[name], f"{path}: {name}")
        baseline = state["baseline"]
        if baseline is not None and baseline.dim():
            raise ValueError(f"{path}: baseline must be one number, got a tensor of shape {tuple(baseline.shape)}")
        self.baseline = None if baseline is None else baseline.to(self.device, copy=True)

    @classmethod
    def resume(
        cls, out: str | Path, net: nn.Module, train: Any, valid: Any, table: Any = None, **more: Any
    ) -> "Search":
        """The search of a run folder as its newest whole checkpoint left it; `fit()` goes on, to the same bits as
        without a stop.

        net, train, valid, table, and what else is given by name: as the search that wrote it was given them. Raises
        FileNotFoundError without a checkpoint, ValueError where none is whole, or it does not fit net or loaders.
        """
        state, path = checkpoint.load(out)
        search = cls(net, train, valid, checkpoint.config_of(SearchConfig, state, path), table, **more)
        search.restore(out, state, path)
        return search

    def _check_target(self) -> None:
        if self.latency is None:
            return
        if isinstance(self.latency, ExpectedLatency) and not self.latency.is_of(self.net):
            raise ValueError(
                "table: got the latency of another net's mixed ops, expected one that was made of this net"
            )
        config, fastest = self.config, getattr(self.latency, "fastest", None)
        if config.target_ms is None:
            raise ValueError("SearchConfig.target_ms: got None with a latency table, expected a latency in ms")
        if fastest is not None and config.target_ms < fastest:
            raise ValueError(
                f"SearchConfig.target_ms: got {config.target_ms:.4g} ms, expected at least the fastest path's "
                f"{fastest:.4g} ms"
            )
        if fastest is not None and fastest <= 1 and config.objective == "mul_log" and config.mode != "reinforce":
            raise ValueError(
                f"SearchConfig.objective: got 'mul_log' with a fastest path of {fastest:.4g} ms, expected 'add_linear' "
                "where a path can take less than 1 ms, since the logarithm changes sign there"
            )

    def _arch_step_due(self, step: int) -> bool:
        return step >= self.config.warmup_epochs * len(self.train) and (step + 1) % self.config.arch_every == 0

    def _arch_batches(self, start: int, step: int) -> Iterator[Any]:
        """Validation batches of an epoch that starts at a step, from another step on; each epoch is a new pass, so the
        step decides the batch."""
        per_epoch = -(-len(self.train) // self.config.arch_every)
        passes = -(-per_epoch // len(self.valid))
        done = sum(self._arch_step_due(earlier) for earlier in range(start, step))
        batches = endless_batches(self.valid, start // len(self.train) * passes, done, self.seed)
        return self.waits.over(batches, "valid")

    def require_same(self) -> None:
        """Raises ValueError where the processes do not have the same alphas, or not the same path where they should."""
        if self.ranks.several:
            paths = [op.active for op in self.ops.values()] if self.config.paths == "same" and not self.spread else []
            self.ranks.require_same("digest of path and alphas", digest([paths, *self.alphas]), self.step)

    def _require_images(self, batch: Any, name: str) -> None:
        if isinstance(self.latency, ExpectedLatency) and isinstance(batch, (list, tuple)) and batch:
            require_images(self.net, batch[0], name)

    @property
    def _looks(self) -> bool:
        """Whether numbers are read in this step: of an accelerator the host has to wait, so only where the log does."""
        return self.device.type == "cpu" or (self.step + 1) % self.config.log_every == 0

    def _require_finite_gradients(self, parameters: list[nn.Parameter], kind: str) -> None:
        if self._looks and not self.backward.scaler.is_enabled():  # the scaler leaves out a step that overflowed
            require_finite_gradients(self.net, parameters, self.step, kind)

    def _require_finite(self, loss: Tensor, batch: Any, kind: str, latency: Tensor | None = None) -> None:
        if self._looks:
            require_finite(loss, self.net, batch, self.step, kind, latency)

    def close_epoch(self, epoch: int) -> list[str]:
        pruned = []
        if self.config.prune_below is not None and epoch >= self.config.warmup_epochs:
            for label, op in self.ops.items():
                pruned += [f"pruned {name} of {label}" for name in op.prune(self.config.prune_below)]
        lines = super().close_epoch(epoch)
        probabilities = {label: op.probabilities().tolist() for label, op in self.ops.items()}
        self.journal.write(self.step - 1, "alpha", probabilities)
        return [*pruned, *lines]
