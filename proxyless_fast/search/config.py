"""What a user of the search tunes, checked when it is built."""

from dataclasses import asdict, dataclass
from typing import Any

from .._deprecated import renamed_fields
from ..checks import is_integer

MODES = ("full", "two", "reinforce")
OBJECTIVES = ("mul_log", "add_linear")
PATHS = ("same", "own")
PRECISIONS = ("float32", "bfloat16", "float16")
OPTIMIZERS = ("sgd", "lars", "lamb")
MOST = 3.4e38  # of float32, which torch takes the optimizers' numbers in

_AT_LEAST = {
    "epochs": 0, "warmup_epochs": 0, "arch_every": 1, "samples": 1, "seed": 0, "log_every": 1,
}  # fmt: skip
_POSITIVE = ("arch_lr", "mul_log_factor", "mul_log_exponent")
_NOT_NEGATIVE = ("arch_weight_decay", "add_linear_weight", "reward_exponent")
_FRACTION = ("baseline_momentum",)


def check(config: Any, field: str, ok: bool, expected: str) -> None:
    """Raises ValueError: one sentence of field, value and what was expected."""
    if not ok:
        raise ValueError(f"{type(config).__name__}.{field}: got {getattr(config, field)!r}, expected {expected}")


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= MOST


def check_numbers(
    config: Any,
    at_least: dict[str, int],
    positive: tuple[str, ...],
    not_negative: tuple[str, ...],
    fraction: tuple[str, ...],
) -> None:
    for field, least in at_least.items():
        check(config, field, is_integer(getattr(config, field), least), f"an integer of at least {least}")
    for field in positive:
        check(config, field, is_number(value := getattr(config, field)) and value > 0, "a number above 0")
    for field in not_negative:
        check(config, field, is_number(value := getattr(config, field)) and value >= 0, "a number of at least 0")
    for field in fraction:
        check(config, field, is_number(value := getattr(config, field)) and 0 <= value < 1, "a number in [0, 1)")


RENAMED = {
    "target": "target_ms", "alpha": "mul_log_factor", "beta": "mul_log_exponent", "weight": "add_linear_weight",
}  # fmt: skip


@dataclass(frozen=True)
class WeightConfig:
    """Settings of the steps that train weights, the same in a search and in the training of a derived net.

    lr, momentum, weight_decay, label_smoothing: SGD with Nesterov momentum, cosine from lr to 0 over all epochs;
        vectors (batch norms and biases) are not decayed.
    lr_batch, lr_warmup_epochs: images that lr is meant for, from where it grows with the batch (Goyal et al. 2017), and
        epochs in which it gets there on a line; None: lr is that of the batch as it is.
    optimizer: "sgd", or "lars" or "lamb" for large batches. clip_norm: bound of the gradients' norm, or None.
    ema_decay: of an exponential average of the weights, which the net has at the end; None: the last weights.
    mixup, cutmix: alphas of the mixing of images and labels (by timm), 0 for none; losses get probabilities then.
    accumulate: parts that each batch goes through in, one after the other, in the memory of one.
    precision: "float32", or autocast to "bfloat16" or "float16" (with a gradient scaler); alphas stay float32.
    sync_norm: with several processes, whether batch norms see the images of all.
    """

    lr: float = 0.05
    lr_batch: int | None = None
    lr_warmup_epochs: int = 0
    optimizer: str = "sgd"
    momentum: float = 0.9
    weight_decay: float = 4e-5
    label_smoothing: float = 0.1
    clip_norm: float | None = None
    ema_decay: float | None = None
    mixup: float = 0.0
    cutmix: float = 0.0
    accumulate: int = 1
    precision: str = "float32"
    sync_norm: bool = False

    def _check_weights(self) -> None:
        least = {"lr_warmup_epochs": 0, "accumulate": 1}
        check_numbers(self, least, ("lr",), ("weight_decay", "mixup", "cutmix"), ("momentum", "label_smoothing"))
        check(self, "optimizer", self.optimizer in OPTIMIZERS, f"one of {', '.join(OPTIMIZERS)}")
        check(self, "precision", self.precision in PRECISIONS, f"one of {', '.join(PRECISIONS)}")
        check(self, "sync_norm", isinstance(self.sync_norm, bool), "True or False")
        if self.lr_batch is not None:
            check(self, "lr_batch", is_integer(self.lr_batch, 1), "an integer of at least 1 or None")
        if self.ema_decay is not None:
            check(self, "ema_decay", is_number(self.ema_decay) and 0 < self.ema_decay < 1, "a number in (0, 1) or None")
        if self.clip_norm is not None:
            check(self, "clip_norm", is_number(self.clip_norm) and self.clip_norm > 0, "a number above 0 or None")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@renamed_fields(RENAMED)
@dataclass(frozen=True)
class SearchConfig(WeightConfig):
    """Settings of a search; the defaults are the official ImageNet ones (batches of 256). See also `WeightConfig`.

    Raises ValueError on construction, with one sentence that names the field, its value and what was expected.

    epochs: passes over the training split with arch steps. warmup_epochs: passes before them that move weights only.
    paths: with several processes, whether all draw the "same" path or each its "own" (Bender et al., CVPR 2020).
    arch_every: one arch step every so many weight steps.
    arch_lr, arch_weight_decay: Adam with betas (0, 0.999) for alphas.
    mode: "full" (paper eq. 4), "two" (paper section 3.2.1: two sampled paths), "reinforce" (paper eq. 5).
    target_ms: latency that the objective refers to; needed when there is a latency table.
    objective: "mul_log": mul_log_factor · CE · (log E[lat] / log target)^mul_log_exponent;
        "add_linear": CE + add_linear_weight · (E[lat] − target) / target.
    samples, baseline_momentum, reward_exponent: of "reinforce": paths per arch step, memory of the moving-average
        baseline, and w of the reward accuracy · (target / lat)^w.
    prune_below: after each epoch, candidates less probable than this are dropped for good; None keeps all.
    seed: of the sampled paths; with the step number it decides every draw.
    log_every: weight steps between writes of the log (values are fetched from the device only then).
    """

    epochs: int = 120
    warmup_epochs: int = 40
    lr: float = 0.025
    paths: str = "same"
    arch_every: int = 5
    arch_lr: float = 1e-3
    arch_weight_decay: float = 0.0
    mode: str = "full"
    target_ms: float | None = None
    objective: str = "mul_log"
    mul_log_factor: float = 0.2
    mul_log_exponent: float = 0.3
    add_linear_weight: float = 0.1
    samples: int = 10
    baseline_momentum: float = 0.99
    reward_exponent: float = 0.1
    prune_below: float | None = None
    seed: int = 0
    log_every: int = 10

    def __post_init__(self) -> None:
        self._check_weights()
        check_numbers(self, _AT_LEAST, _POSITIVE, _NOT_NEGATIVE, _FRACTION)
        check(self, "mode", self.mode in MODES, f"one of {', '.join(MODES)}")
        check(self, "paths", self.paths in PATHS, f"one of {', '.join(PATHS)}")
        expected = "False where each process draws its own path: their norms have nothing in common"
        check(self, "sync_norm", not (self.sync_norm and self.paths == "own"), expected)
        check(self, "objective", self.objective in OBJECTIVES, f"one of {', '.join(OBJECTIVES)}")
        if self.target_ms is not None:
            check(self, "target_ms", is_number(self.target_ms) and self.target_ms > 0, "a latency above 0 ms or None")
            mul_log = self.objective == "mul_log" and self.mode != "reinforce"
            expected = "above 1 ms with objective 'mul_log', whose logarithm changes sign there (use 'add_linear')"
            check(self, "target_ms", not mul_log or self.target_ms > 1, expected)
        if self.prune_below is not None:
            expected = "a probability in (0, 0.5] or None"
            check(self, "prune_below", is_number(self.prune_below) and 0 < self.prune_below <= 0.5, expected)
