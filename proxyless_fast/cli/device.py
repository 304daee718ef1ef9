"""--device: one that computes, known before anything is built or written."""

from argparse import Namespace

import torch


def of(args: Namespace) -> str:
    """The device that was asked for, or the best one here."""
    if args.device is not None:
        return args.device
    return "cuda" if torch.cuda.is_available() else "cpu"


def check(args: Namespace) -> None:
    """Raises ValueError where the stage has a device that cannot compute: one that is not here, or "meta"."""
    if not hasattr(args, "device"):
        return
    device = of(args)
    try:
        # float64: what the accuracy is added up in
        torch.ones(1, device=torch.device(device), dtype=torch.float64).add(1).item()
    except Exception as error:  # of every kind, by device
        reason = str(error).strip().splitlines()[0].split(". ")[0]
        raise ValueError(
            f"--device: got {device!r}, expected a device of this machine that computes, such as cpu ({reason})"
        ) from error
