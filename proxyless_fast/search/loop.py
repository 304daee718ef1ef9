"""The search: weights on training data, alphas on validation data, in turns (paper section 3.2)."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ..io.state import load_state
from ..latency import ExpectedLatency, LatencyTable
from ..supernet import arch_parameters, mixed_ops, rescale, sample, weight_parameters
from . import checkpoint
from .agreement import require_agreement, require_images, require_one_process
from .batches import endless_batches, epoch_batches, generator
from .config import SearchConfig
from .diagnose import require_finite, require_finite_gradients
from .interrupt import Interrupt
from .journal import Journal
from .objectives import objective
from .optim import adam, frozen, set_cosine_lr, sgd
from .progress import console, note, progress_bar, report_epoch
from .reinforce import log_probability, reward, surrogate, update_baseline


class Search:
    """A search over the mixed ops of any module; `fit()` runs it.

    net: maps a batch of inputs to logits (B, classes); trained in place, on the device its parameters are on.
    train, valid: sized iterables of (inputs, labels) batches, of disjoint splits; `set_epoch(n)` of the loader or of
        its sampler is called where there is one, and makes a resume exact even within an epoch.
    config: SearchConfig.
    table: a LatencyTable, for a net with `layers()`; or any object that returns E[lat] in ms, a differentiable scalar,
        when called and has `of_choices({label: index}) -> ms`; None: no latency term.
    out: folder for search.jsonl, tensorboard/ and checkpoint.pt; None: nothing is written.

    `history` gets a dict of means after each epoch. Raises ValueError where the net has no mixed op, a loader is empty,
    its images or classes are not the net's, or the target does not suit the table, and NonFiniteLoss (a ValueError)
    where a loss or a gradient is NaN or infinite.
    """

    def __init__(
        self,
        net: nn.Module,
        train: Any,
        valid: Any,
        config: SearchConfig | None = None,
        table: Any = None,
        out: str | Path | None = None,
    ) -> None:
        self.net, self.train, self.valid = net, train, valid
        self.config = config = config or SearchConfig()
        require_one_process()
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
        self.weight_optimizer = sgd(self.weights, config.lr, config.momentum, config.weight_decay)
        self.arch_optimizer = adam(self.alphas, config.arch_lr, config.arch_weight_decay)
        self.step, self.total_steps = 0, len(train) * (config.warmup_epochs + config.epochs)
        self.baseline: Tensor | None = None
        self.history: list[dict[str, float]] = []
        self.out = None if out is None else Path(out)
        self.journal = Journal(None)

    def weight_step(self, inputs: Any, labels: Tensor) -> None:
        """One SGD step of the weights of a sampled path. Only its parameters get a gradient, momentum and decay."""
        lr = set_cosine_lr(self.weight_optimizer, self.config.lr, self.step, self.total_steps)
        self._require_images(inputs, "train")
        sample(self.net, "path", generator=generator(self.config.seed, self.step, "weight"))
        self.weight_optimizer.zero_grad(set_to_none=True)
        with frozen(self.alphas):
            logits = self.net(inputs)
            loss = cross_entropy(logits, labels, label_smoothing=self.config.label_smoothing)
            self._require_finite(loss, inputs, labels, "weight")
            loss.backward()
        self._require_finite_gradients(self.weights, "weight")
        self.weight_optimizer.step()
        self.journal.add(self.step, "weight", loss=loss, top1=_top1(logits, labels), lr=lr)

    def arch_step(self, inputs: Any, labels: Tensor) -> None:
        """One Adam step of the alphas; weights are frozen, so backward computes gradients of activations only."""
        self._require_images(inputs, "valid")
        self.arch_optimizer.zero_grad(set_to_none=True)
        gradient = self._reinforce_gradient if self.config.mode == "reinforce" else self._gate_gradient
        with frozen(self.weights):
            measured = gradient(inputs, labels)
        self._require_finite_gradients(self.alphas, "arch")
        self.arch_optimizer.step()
        if self.config.mode == "two":
            rescale(self.net)
        self.journal.add(self.step, "arch", **measured, entropy=self.entropy())

    def _gate_gradient(self, inputs: Any, labels: Tensor) -> dict[str, Tensor]:
        mode: Any = self.config.mode
        sample(self.net, mode, generator=generator(self.config.seed, self.step, "arch"))
        logits = self.net(inputs)
        loss = ce = cross_entropy(logits, labels)
        measured = {"ce": ce, "top1": _top1(logits, labels)}
        if self.latency is not None:
            c = self.config
            measured["latency"] = self.latency()
            ref, factor, exponent = c.target_ms or 0.0, c.mul_log_factor, c.mul_log_exponent
            loss = objective(ce, measured["latency"], ref, c.objective, factor, exponent, c.add_linear_weight)
        self._require_finite(loss, inputs, labels, "arch", measured.get("latency"))
        loss.backward()
        return {"loss": loss, **measured}

    def _reinforce_gradient(self, inputs: Any, labels: Tensor) -> dict[str, Tensor]:
        draws = generator(self.config.seed, self.step, "arch")
        log_p, accuracies, rewards = [], [], []
        for _ in range(self.config.samples):
            sample(self.net, "path", generator=draws)
            with torch.no_grad():
                accuracies.append(_top1(self.net(inputs), labels))
            choices = {label: op.active for label, op in self.ops.items()}
            latency = None if self.latency is None else self.latency.of_choices(choices)
            rewards.append(reward(accuracies[-1], latency, self.config.target_ms, self.config.reward_exponent))
            log_p.append(log_probability(self.ops.values()))
        stacked = torch.stack(rewards)
        surrogate(torch.stack(log_p), stacked, self.baseline).backward()
        self.baseline = update_baseline(self.baseline, stacked, self.config.baseline_momentum)
        measured = {"reward": stacked.mean(), "top1": torch.stack(accuracies).mean()}
        return measured if self.latency is None else {**measured, "latency": self.latency().detach()}

    def fit(self) -> "Search":
        """Runs all remaining epochs, with a checkpoint after each.

        Ctrl-C, SIGTERM, SIGHUP and SIGUSR1 save after the running step; then KeyboardInterrupt is raised, or Preempted
        (a SystemExit of code 0), and says how to go on.
        """
        if self.out is not None:
            self.out.mkdir(parents=True, exist_ok=True)
        sums = self.journal.state_dict()
        self.journal = Journal(self.out and self.out / "search.jsonl", first_step=self.step)
        self.journal.load_state_dict(sums)
        progress, task = progress_bar("search", self.total_steps, self.step)
        self.net.train()
        try:
            with progress, Interrupt() as interrupt:
                while self.step < self.total_steps:
                    epoch, arch_batches = self.step // len(self.train), self._arch_batches()
                    for batch in epoch_batches(self.train, epoch, self.step % len(self.train)):
                        self.weight_step(*self._to_device(batch))
                        if self._arch_step_due(self.step):
                            self.arch_step(*self._to_device(next(arch_batches)))
                        self.step += 1
                        if self.step % self.config.log_every == 0:
                            progress.update(task, completed=self.step, note=note(self.journal.flush()))
                        if interrupt.requested:
                            break
                    if self.step % len(self.train) == 0:
                        self._close_epoch(epoch)
                    if interrupt.requested:
                        raise interrupt.stop(self._saved())
        finally:
            self.journal.close()
        return self

    def entropy(self) -> Tensor:
        """Mean entropy of the mixed ops' probabilities, in nats."""
        return torch.stack([torch.special.entr(op.probabilities().detach()).sum() for op in self.ops.values()]).mean()

    def save(self) -> Path:
        """Writes the checkpoint that `resume` continues from exactly."""
        if self.out is None:
            raise ValueError("out: the search has no folder, expected one to save a checkpoint in")
        return checkpoint.save(
            self.out,
            {
                "step": self.step,
                "config": self.config.to_dict(),
                "net": self.net.state_dict(),
                "weight_optimizer": self.weight_optimizer.state_dict(),
                "arch_optimizer": self.arch_optimizer.state_dict(),
                "baseline": self.baseline,
                "history": self.history,
                "sums": self.journal.state_dict(),
                "rng": torch.get_rng_state(),
            },
        )

    @classmethod
    def resume(cls, out: str | Path, net: nn.Module, train: Any, valid: Any, table: Any = None) -> "Search":
        """The search of a run folder as its checkpoint left it; `fit()` goes on, to the same bits as without a stop.

        net, train, valid, table: as they were given to the search that wrote it. Raises FileNotFoundError without a
        checkpoint, ValueError where it is damaged, or does not fit the net or the loaders.
        """
        state, path = checkpoint.load(out), Path(out) / checkpoint.NAME
        search = cls(net, train, valid, checkpoint.config_of(state, path), table, out)
        load_state(net, state["net"], str(path))
        checkpoint.restore(search, state, path)
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

    def _arch_batches(self) -> Any:
        """Validation batches from the running step on; each epoch starts a new pass, so the step decides the batch."""
        epoch, start = self.step // len(self.train), self.step - self.step % len(self.train)
        per_epoch = -(-len(self.train) // self.config.arch_every)
        passes = -(-per_epoch // len(self.valid))
        done = sum(self._arch_step_due(step) for step in range(start, self.step))
        return endless_batches(self.valid, epoch * passes, done)

    def _to_device(self, batch: Any) -> tuple[Any, Tensor]:
        inputs, labels = batch
        return inputs.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)

    def _require_images(self, inputs: Any, name: str) -> None:
        if isinstance(self.latency, ExpectedLatency):
            require_images(self.net, inputs, name)

    @property
    def _looks(self) -> bool:
        """Whether numbers are read in this step: of an accelerator the host has to wait, so only where the log does."""
        return self.device.type == "cpu" or (self.step + 1) % self.config.log_every == 0

    def _require_finite_gradients(self, parameters: list[nn.Parameter], kind: str) -> None:
        if self._looks:
            require_finite_gradients(self.net, parameters, self.step, kind)

    def _require_finite(
        self, loss: Tensor, inputs: Any, labels: Tensor, kind: str, latency: Tensor | None = None
    ) -> None:
        if self._looks:
            require_finite(loss, self.net, inputs, labels, self.step, kind, latency)

    def _close_epoch(self, epoch: int) -> None:
        if self.config.prune_below is not None and epoch >= self.config.warmup_epochs:
            for label, op in self.ops.items():
                for name in op.prune(self.config.prune_below):
                    console.print(f"pruned {name} of {label}", soft_wrap=True)
        self.history.append({"epoch": epoch, **self.journal.close_epoch()})
        self.journal.write(self.step - 1, "epoch", self.history[-1])
        self.journal.write(
            self.step - 1, "alpha", {label: op.probabilities().tolist() for label, op in self.ops.items()}
        )
        report_epoch(self.history[-1], self.config.warmup_epochs + self.config.epochs)
        if self.out is not None:
            self.save()

    def _saved(self) -> str:
        """Saves, where there is a folder, and says how to go on."""
        stopped = f"search stopped after step {self.step} of {self.total_steps}"
        if self.out is None:
            return stopped
        self.save()
        return f"{stopped}; Search.resume({str(self.out)!r}, ...) or `proxyless-fast search --resume` continues it"


def _top1(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits.detach().argmax(1) == labels).float().mean()
