"""The options of every subcommand."""

import argparse
from dataclasses import fields
from typing import Any

from ..report.ends import Parser
from ..search import Checkpoints, SearchConfig, TrainConfig
from ..search.config import RENAMED
from . import defaults
from .space import SPACES

HELP = {
    "epochs": "epochs",
    "warmup_epochs": "epochs before them that train weights only",
    "lr": "learning rate of the weights, cosine to 0",
    "lr_batch": "images that the learning rate is meant for: with larger batches it grows alike",
    "lr_warmup_epochs": "epochs in which the learning rate gets to its full value",
    "optimizer": "of the weights: sgd, or lars or lamb for large batches (these need timm)",
    "clip_norm": "bound of the norm of the weights' gradient",
    "ema_decay": "of an exponential average of the weights, which are taken at the end (such as 0.9999)",
    "mixup": "alpha of mixup, 0 for none (needs timm)",
    "cutmix": "alpha of cutmix, 0 for none (needs timm)",
    "accumulate": "parts that each batch goes through in, in the memory of one",
    "precision": "float32, or autocast to bfloat16 or float16",
    "sync_norm": "with several processes: batch norms see the images of all",
    "paths": "with several processes: all train the same path, or each its own",
    "momentum": "Nesterov momentum",
    "weight_decay": "of weights; batch norms and biases are not decayed",
    "label_smoothing": "label smoothing of the weights' loss",
    "arch_every": "one arch step every so many weight steps",
    "arch_lr": "Adam's learning rate of the architecture parameters",
    "arch_weight_decay": "weight decay of the architecture parameters",
    "mode": "gradient through all gates (full), through two sampled ones (two), or reinforce",
    "objective": "how latency enters the loss: mul_log or add_linear",
    "mul_log_factor": "factor of mul_log",
    "mul_log_exponent": "exponent of mul_log",
    "add_linear_weight": "weight of the latency term of add_linear",
    "samples": "reinforce: paths per arch step",
    "baseline_momentum": "reinforce: memory of the baseline",
    "reward_exponent": "reinforce: w of the reward accuracy * (target / latency)^w",
    "prune_below": "drop candidates less probable than this after each epoch",
    "log_every": "weight steps between writes of the log",
}

WHOLE = ("lr_batch",)  # of those whose default does not tell

EPILOGS = {
    "plan": """examples:
  proxyless-fast plan --space mobile --budget 16
  proxyless-fast plan --space mobile --resolution 160      in what memory this machine has free

of the batch of one process and one part: --accumulate and more processes multiply it""",
    "profile": """examples:
  proxyless-fast profile
  proxyless-fast profile --run runs/imagenet --space mobile --num-classes 100 --resolution 160
  proxyless-fast profile --candidates 3x3_MBConv3 5x5_MBConv6 --threads 2

writes latency.yaml""",
    "search": """examples:
  proxyless-fast search --all                       everything, from profile to export, with the defaults
  proxyless-fast search --all --target 0.1          a net that takes at most 0.1 ms
  proxyless-fast search --run runs/a --mode two --epochs 10
  proxyless-fast search --run runs/a --resume       goes on after any stop, with the settings it was started with
  proxyless-fast search --all --resume              the same, and all stages that the run has not ended
  proxyless-fast search --all --space mobile --data /data/imagenet --table mobile.yaml --target 80

reads latency.yaml; writes search.jsonl, tensorboard/, checkpoints/""",
    "derive": """examples:
  proxyless-fast derive
  proxyless-fast derive --run runs/a --target 0.09   another target, without another search

reads checkpoints/ and latency.yaml; writes arch.json and weights.safetensors""",
    "train": """examples:
  proxyless-fast train
  proxyless-fast train --run runs/a --from-scratch --epochs 30
  proxyless-fast train --run runs/a --resume        goes on after any stop, with the settings it was started with

reads arch.json and weights.safetensors; writes weights.safetensors, train.jsonl
and, until it ends, train-checkpoints/""",
    "eval": """examples:
  proxyless-fast eval
  proxyless-fast eval --run runs/a --data /data/imagenet

reads arch.json and weights.safetensors""",
    "export": """examples:
  proxyless-fast export
  proxyless-fast export --run runs/a --threads 2

reads arch.json and weights.safetensors; writes net.onnx, compared with torch and timed by ONNX Runtime""",
    "report": """examples:
  proxyless-fast report --run runs/a

reads report.json""",
}

SUMMARIES = {
    "plan": "the largest batch of a search that fits into memory, before anything runs",
    "profile": "measure the latency of each block of a search space on this machine",
    "search": "search a network within a latency (with --all: every stage, profile to export)",
    "derive": "keep the most probable path that meets the target",
    "train": "train the derived network",
    "eval": "accuracy of the derived network on the test images",
    "export": "write the network as ONNX and measure it",
    "report": "print the table of a run",
}


def build_parser() -> argparse.ArgumentParser:
    top = Parser(
        prog="proxyless-fast",
        description="Search a network for this machine: profile, search, derive, train, eval, export.",
        epilog="`proxyless-fast COMMAND --help` has options, defaults and examples.",
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    subparsers = {}
    for name, summary in SUMMARIES.items():
        subparsers[name] = commands.add_parser(
            name,
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}.",
            epilog=EPILOGS[name],
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        subparsers[name].add_argument(
            "--run",
            "--folder",
            metavar="FOLDER",
            default="runs/default",
            help="run folder (default: %(default)s); torchrun takes --run for its own, so there say --folder",
        )
    commands.add_parser("bench", help="speed and memory beside other implementations (in a clone of the repository)")
    subparsers["plan"].add_argument(
        "--budget", metavar="GIB", type=float, help="memory for all of a search (default: what is free here)"
    )
    for name in ("plan", "profile", "search"):
        _space_options(subparsers[name])
    for name in ("profile", "search", "export"):
        _timing_options(subparsers[name])
    for name in ("search", "train", "eval"):
        _data_options(subparsers[name], name)
    _search_options(subparsers["search"])
    subparsers["derive"].add_argument(
        "--target", metavar="MS", type=float, help="latency not to exceed (default: the search's target)"
    )
    subparsers["train"].add_argument("--resume", action="store_true", help="go on from the newest checkpoint")
    _checkpoint_options(subparsers["train"])
    group = subparsers["train"].add_argument_group("training")
    group.add_argument("--from-scratch", action="store_true", help="start from fresh weights, not from inherited ones")
    _config_options(group, TrainConfig, "", {space: defaults.of_space(space, TrainConfig) for space in SPACES})
    return top


def _space_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("search space (of a run that has been profiled: as there)")
    group.add_argument("--space", help=f"{', '.join(SPACES)} (default: small)")
    group.add_argument("--num-classes", type=int, metavar="N", help="classes (default: of the data, or of the space)")
    group.add_argument(
        "--in-channels", type=int, metavar="N", help="image channels (default: of the data, or of the space)"
    )
    group.add_argument("--resolution", type=int, metavar="N", help="image side (default: of the data, or of the space)")
    group.add_argument("--width", type=float, metavar="X", help="width multiplier (mobile only; default: 1.0)")
    group.add_argument("--candidates", nargs="+", metavar="NAME", help="operations, e.g. 3x3_MBConv3 5x5_MBConv6")


def _timing_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("latency")
    group.add_argument("--threads", type=int, metavar="N", help="threads of ONNX Runtime (default: 1, or as profiled)")
    group.add_argument(
        "--repeats", type=int, metavar="N", default=30, help="rounds of measurement (default: %(default)s)"
    )


def _data_options(parser: argparse.ArgumentParser, name: str) -> None:
    group = parser.add_argument_group("data (of a run that has been searched: as there)")
    group.add_argument(
        "--data",
        metavar="NAME",
        help="fashion-mnist, a folder of IDX files, a folder with images or shards (.tar) in train/ and val/, or a "
        "brace pattern of shards (default: fashion-mnist)",
    )
    batch_sizes = {space: values["batch_size"] for space, values in defaults.LOADER.items()}
    group.add_argument(
        "--batch-size", type=int, metavar="N", help=f"images per step ({defaults.describe(batch_sizes)})"
    )
    group.add_argument(
        "--workers", type=int, metavar="N", default=2, help="processes that decode images (default: %(default)s)"
    )
    group.add_argument(
        "--seed", type=int, metavar="N", help="of weights, order of images and sampled paths (default: 0)"
    )
    group.add_argument("--device", help="cpu, cuda, ... (default: cuda where there is one, else cpu)")
    if name != "eval":
        group.add_argument(
            "--rand-augment", metavar="NAME", help="timm's RandAugment of training images, such as rand-m9-mstd0.5"
        )
        group.add_argument(
            "--random-erasing", metavar="X", type=float, help="probability of timm's random erasing (default: 0)"
        )
        shifts = {space: values["shift"] for space, values in defaults.LOADER.items()}
        group.add_argument(
            "--shift",
            type=int,
            metavar="N",
            help="images from IDX files: move each by up to N pixels and mirror half of them; 0: leave them "
            f"({defaults.describe(shifts)})",
        )
    if name == "search":
        fractions = {space: values["valid_fraction"] for space, values in defaults.LOADER.items()}
        group.add_argument(
            "--valid-fraction",
            type=float,
            metavar="X",
            help=f"part of the training images kept for arch steps ({defaults.describe(fractions)})",
        )


def _search_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--all", action="store_true", help="run every stage: profile to export, and print the table")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint")
    _checkpoint_options(parser)
    group = parser.add_argument_group("search")
    group.add_argument(
        "--target",
        metavar="MS|P%",
        default=None,
        help="latency in ms, or how far from the space's fastest path to its slowest "
        f"(default: {defaults.TARGET.replace('%', '%%')})",
    )
    group.add_argument("--table", metavar="FILE", help="latency table (default: latency.yaml of the run)")
    group.add_argument("--no-latency", action="store_true", help="search for accuracy alone")
    _config_options(group, SearchConfig, "", {space: defaults.of_space(space, SearchConfig) for space in SPACES})
    group = parser.add_argument_group("training (with --all)")
    per_space = {space: defaults.of_space(space, TrainConfig) for space in SPACES}
    _config_options(group, TrainConfig, "train_", per_space, only=("epochs", "lr"))


def _checkpoint_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("checkpoints (at each epoch's end and each stop; the last 3 are kept)")
    group.add_argument(
        "--checkpoint-minutes",
        type=float,
        metavar="X",
        default=Checkpoints.minutes,
        help="also after so many minutes (default: %(default)s)",
    )
    group.add_argument("--checkpoint-steps", type=int, metavar="N", help="also after so many steps (default: none)")


def checkpoints_of(args: argparse.Namespace) -> Checkpoints:
    """When the run of a command saves. Raises ValueError, which names the option."""
    try:
        return Checkpoints(args.checkpoint_steps, args.checkpoint_minutes)
    except ValueError as error:
        raise ValueError(str(error).replace("Checkpoints.", "--checkpoint-")) from error


def _config_options(
    group: Any, kind: type, prefix: str, per_space: dict[str, dict[str, Any]], only: tuple[str, ...] | None = None
) -> None:
    for field in fields(kind):
        if field.name not in HELP or (only and field.name not in only):
            continue
        values = {space: settings[field.name] for space, settings in per_space.items()}
        text = defaults.describe(values).replace("%", "%%")
        if isinstance(field.default, bool):
            name = f"--{(prefix + field.name).replace('_', '-')}"
            group.add_argument(name, action="store_true", default=None, help=HELP[field.name])
            continue
        number = next((type(v) for v in values.values() if v is not None), float)
        if field.name in WHOLE:
            number = int
        metavar = {int: "N", float: "X", str: "NAME"}[number]
        old = next((name for name, new in RENAMED.items() if new == field.name), None)
        names = [prefix + field.name, *([] if old is None else [old])]
        group.add_argument(
            *(f"--{name.replace('_', '-')}" for name in names),
            type=number,
            metavar=metavar,
            help=f"{HELP[field.name]} ({text})",
        )


def config_of(kind: type, args: argparse.Namespace, space: str, prefix: str = "", **fixed: Any) -> Any:
    """SearchConfig or TrainConfig: the space's defaults, with the options that were given. Raises ValueError."""
    values = defaults.of_space(space, kind)
    for name in values:
        given = getattr(args, prefix + name, None)
        if name in HELP and given is not None:
            values[name] = given
    return kind(**{**values, **fixed})
