"""What the usual ImageNet recipes do to a training image, by timm: RandAugment and random erasing."""

from __future__ import annotations

import re
from collections.abc import Callable
from numbers import Real
from typing import Any

# As timm writes it: rand-m9-mstd0.5. The sections are of timm.data.auto_augment.rand_augment_transform.
RAND_AUGMENT = re.compile(
    r"rand(-(m\d{1,2}|n\d{1,2}|p(0|1|0?\.\d+|1\.0+)|mstd(\d{1,3}(\.\d+)?|inf)|mmax\d{1,2}|inc[01]))*"
)
EXAMPLE = "rand-m9-mstd0.5"


def check_rand_augment(value: Any, name: str = "rand_augment") -> None:
    """Raises ValueError, which names the argument, for what is neither None nor a RandAugment of timm's."""
    if value is not None and not (isinstance(value, str) and RAND_AUGMENT.fullmatch(value)):
        raise ValueError(f"{name}: got {value!r}, expected None or what timm writes as {EXAMPLE}")


def check_random_erasing(value: Any, name: str = "random_erasing") -> None:
    """Raises ValueError, which names the argument, for what is no probability."""
    if not (isinstance(value, Real) and not isinstance(value, bool) and 0 <= float(value) <= 1):
        raise ValueError(f"{name}: got {value!r}, expected a probability in [0, 1]")


def need_timm(name: str) -> Any:
    """timm.data. Raises ImportError, which names the option, where timm is missing."""
    try:
        import timm.data
    except ImportError as error:
        raise ImportError(f"{name}: needs timm, expected it installed: pip install proxyless-fast[recipe]") from error
    return timm.data


def rand_augment(config: str, resolution: int, mean: tuple[float, ...]) -> Callable:
    """RandAugment of a PIL image, with timm's settings for images of `resolution`."""
    check_rand_augment(config)
    hparams = {"translate_const": int(resolution * 0.45), "img_mean": tuple(round(255 * value) for value in mean)}
    return need_timm("rand_augment").auto_augment.rand_augment_transform(config, hparams)


def random_erasing(probability: float) -> Callable:
    """Noise over a rectangle of a normalised image, with that probability, as timm's recipes do it."""
    check_random_erasing(probability)
    return need_timm("random_erasing").random_erasing.RandomErasing(probability, mode="pixel", device="cpu")
