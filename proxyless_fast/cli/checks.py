"""What is known to be wrong from the options alone, before anything is read, built or written."""

import math
from argparse import Namespace

import torch

# By the option: the least and the most. What is beyond takes all of a machine, or is no number that torch takes.
RANGES = {
    "num_classes": (1, 1 << 16), "in_channels": (1, 1 << 16), "resolution": (1, 1 << 16), "shift": (0, 1 << 16),
    "batch_size": (1, 1 << 31), "workers": (0, 1 << 10), "threads": (1, 1 << 10), "repeats": (1, 1 << 20),
    "seed": (0, (1 << 63) - 1),
}  # fmt: skip


def check(args: Namespace) -> None:
    """Raises ValueError, which names the option, for a number out of its range or a device that cannot compute."""
    if not args.run:
        raise ValueError("--run: got '', expected a folder")
    for name, (least, most) in RANGES.items():
        value = getattr(args, name, None)
        if value is not None and not least <= value <= most:
            raise ValueError(f"--{name.replace('_', '-')}: got {value}, expected {least} to {most:,}")
    if args.command == "plan" and args.budget is not None and not 0 < args.budget <= 1 << 20:
        raise ValueError(f"--budget: got {args.budget}, expected GiB above 0")
    if args.command == "derive" and args.target is not None and not math.isfinite(args.target):
        raise ValueError(f"--target: got {args.target}, expected milliseconds")
    if args.command == "search" and args.no_latency and args.table is not None:
        raise ValueError(f"--table: got {args.table!r} with --no-latency, expected one of the two")
    if hasattr(args, "device"):
        _check_device(device_of(args))


def device_of(args: Namespace) -> str:
    """The device that was asked for, or the best one here."""
    if args.device is not None:
        return args.device
    return "cuda" if torch.cuda.is_available() else "cpu"


def _check_device(device: str) -> None:
    """Raises ValueError for a device that is not here, or has no values, such as "meta"."""
    try:
        # float64: what the accuracy is added up in
        torch.ones(1, device=torch.device(device), dtype=torch.float64).add(1).item()
    except Exception as error:  # of every kind, by device
        reason = str(error).strip().splitlines()[0].split(". ")[0][:200]
        raise ValueError(
            f"--device: got {device!r}, expected a device of this machine that computes, such as cpu ({reason})"
        ) from error
