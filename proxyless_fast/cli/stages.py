"""The stages, from profile to export; each is a subcommand."""

import copy
from argparse import Namespace
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import data
from .. import export as exports
from ..costs import count_macs, count_parameters
from ..io.schemas import Description, check
from ..io.state import load_state
from ..io.text import plain, short
from ..latency import ExpectedLatency, LatencyTable, MissingKey, measure
from ..latency import profile as profile_net
from ..planning import plan as plan_of
from ..report import describe_blocks
from ..search import Checkpoints, Search, SearchConfig, TrainConfig, Training, checkpoint, evaluate
from ..search.memory import available_bytes
from ..search.progress import progress_bar, say
from ..search.recipe import take_average
from ..supernet import derive as derive_net
from . import checks, defaults, space
from .parser import checkpoints_of, config_of
from .run import Run
from .target import choose, parse_target

SEARCHED = ["search.jsonl", "tensorboard/", "checkpoints/"]
SPACE_OPTIONS = ("num_classes", "in_channels", "resolution", "width", "candidates")


def plan(run: Run, args: Namespace) -> None:
    """Says how large a batch fits; writes nothing."""
    name = "small" if args.space is None else args.space
    net = space.build(name, _given(args, SPACE_OPTIONS))
    budget = available_bytes() if args.budget is None else int(args.budget * 2**30)
    found = plan_of(net, budget)
    for policy, images in found.largest.items():
        need = found.step_bytes[policy](max(images, 1)) + found.kept_bytes
        say(f"policy {policy}: at most {images:,} images in {budget / 2**30:.2f} GiB ({need / 2**30:.2f} GiB)")


def profile(run: Run, args: Namespace, net: nn.Module | None = None) -> None:
    """Measures this machine and writes latency.yaml."""
    with run.timed("profile") as figures:
        name, given = "small" if args.space is None else args.space, _given(args, SPACE_OPTIONS)
        alone = net is None
        net = space.build(name, given) if net is None else net
        progress, task = progress_bar("profile", args.repeats)
        with progress:
            table = profile_net(
                net,
                threads=1 if args.threads is None else args.threads,
                repeats=args.repeats,
                progress=lambda done, rounds: progress.update(task, completed=done, total=rounds),
            )
        table.save(run.latency)
        if alone:
            run.record("space", space.settings_of(name, given, net))
        latency = ExpectedLatency(net, table)
        figures |= {"fastest": latency.fastest, "slowest": latency.slowest, **table.header, "files": [run.latency.name]}
    say(
        f"profile: {len(table)} blocks; fastest path {latency.fastest:.4g} ms, slowest {latency.slowest:.4g} ms; whole "
        f"paths were predicted within {table.header['path_error']:.1%}"
    )


def search(run: Run, args: Namespace) -> None:
    """Searches, from the start or from the newest checkpoint; with args.all, profiles before."""
    every = checkpoints_of(args)
    settings, data_settings, splits = _resumed_space(run, args) if args.resume else _new_space(run, args)
    name = settings.pop("name")
    for key in ("num_classes", "in_channels"):
        if settings[key] != getattr(splits, key):
            option = f"--{key.replace('_', '-')}"
            raise ValueError(
                f"{option}: got {settings[key]}, expected {getattr(splits, key)} as in {data_settings['name']}"
            )
    if splits.valid is None:
        raise ValueError("--valid-fraction: got 0, expected part of the training images for the arch steps")
    config_of(SearchConfig, args, name)  # wrong values should be told before anything takes time
    config_of(TrainConfig, args, name, prefix="train_")
    torch.manual_seed(data_settings["seed"])
    net = _prepare(space.build(name, settings), args)
    if args.resume:
        return _go_on(run, args, net, splits, every)
    if args.all and args.table is None and not args.no_latency:
        run.alone(profile, run, args, net)

    with run.timed("search") as figures:
        latency = None if args.no_latency else ExpectedLatency(net, _table(run, args.table))
        target, source = parse_target(args.target, latency)
        config = config_of(SearchConfig, args, name, target_ms=target, seed=data_settings["seed"])
        figures |= {"target": target, "target_source": source, **config.to_dict()}
        found = Search(net, splits.train, splits.valid, config, latency, run.folder, checkpoints=every)
        # What --resume and later stages need to know must be there if the search is interrupted.
        run.record("space", space.settings_of(name, settings, net))
        run.record("data", data_settings)
        run.record("search", {**figures, "seconds": 0.0})
        _tell_target(figures)
        found.fit()
        figures["files"] = SEARCHED


def _new_space(run: Run, args: Namespace) -> tuple[dict[str, Any], dict[str, Any], data.Splits]:
    """Settings of the space and of the data, and the loaders, of a search from the start."""
    earlier = checkpoint.newest(run.folder)
    if earlier is not None:
        raise ValueError(
            f"{run.folder}: holds an earlier search ({earlier.relative_to(run.folder)}): add --resume to go on with "
            "it, or --run FOLDER to begin another"
        )
    stored = {} if args.all else dict(run.report().get("space", {}))
    settings = stored | _given(args, SPACE_OPTIONS) | ({} if args.space is None else {"name": args.space})
    settings.setdefault("name", "small")
    if settings["name"] not in space.SPACES:
        space.build(settings["name"], {})
    splits, data_settings = _load_splits(run, args, settings["name"], settings.get("resolution"), {})
    for key in ("num_classes", "in_channels", "resolution"):
        settings.setdefault(key, getattr(splits, key))
    return settings, data_settings, splits


def _resumed_space(run: Run, args: Namespace) -> tuple[dict[str, Any], dict[str, Any], data.Splits]:
    """The same, of the search of the run; options that differ are refused."""
    checkpoint.load(run.folder)
    settings, data_settings = dict(run.stage("space")), run.stage("data")
    _require_same(args, {**settings, "space": settings["name"], **run.stage("search")})
    _require_same(args, {**data_settings, "data": data_settings["name"]})
    if args.no_latency and run.stage("search").get("target") is not None:
        raise ValueError("--no-latency: got it with --resume, expected the target that the search was started with")
    if args.target is not None or args.table is not None:
        raise ValueError("--resume: got a target or a table with it, expected those that the search was started with")
    splits, _ = _load_splits(run, args, settings["name"], settings["resolution"], data_settings)
    return settings, data_settings, splits


def _go_on(run: Run, args: Namespace, net: nn.Module, splits: data.Splits, every: Checkpoints) -> None:
    """The rest of the run's search; one that has ended is left as it is, with what later stages made of it."""
    searched = run.stage("search")
    with _naming(run.report_file):
        latency = None if searched["target"] is None else ExpectedLatency(net, _table(run, None))
        found = Search.resume(run.folder, net, splits.train, splits.valid, latency, checkpoints=every)
    _require_same_search(run, found.config.to_dict(), found.path or run.folder)
    if found.step == found.total_steps and "files" in searched:
        say(f"search: it has ended, after step {found.step:,}")
        return
    with run.timed("search") as figures:
        figures |= searched
        _tell_target(figures)
        found.fit()
        figures["files"] = SEARCHED


def _tell_target(figures: Mapping[str, Any]) -> None:
    if figures["target"] is not None:
        say(f"search: target {figures['target']:.4g} ms, {figures['target_source']}")


def derive(run: Run, args: Namespace) -> None:
    """Keeps the most probable path that meets the target."""
    with run.timed("derive") as figures:
        settings = dict(run.stage("space"))
        searched = run.stage("search")
        state, path = checkpoint.load(run.folder)
        net = space.build(settings.pop("name"), settings)
        _require_same_search(run, state["config"], path)
        with _naming(run.report_file):
            load_state(net, state["net"], str(path))
            if state.get("average"):
                averaged = copy.deepcopy(net)
                load_state(averaged, state["average"], f"{path}: average")
                take_average(net, averaged)
        explicit = args.target if args.command == "derive" else None
        target = searched["target"] if explicit is None else explicit
        latency, error = None, 0.0
        if target is not None:
            table = LatencyTable.load(run.need(run.latency, "profile"))
            with _naming(run.report_file):
                latency, error = ExpectedLatency(net, table), table.header.get("path_error", 0.0)
        choices, figures["note"] = choose(net, latency, target, error)
        figures["target"] = target
        figures["predicted"] = None if latency is None else latency.of_choices(choices)
        figures["blocks"] = describe_blocks(net, choices)
        net = derive_net(net, choices)
        exports.describe(net, **_description(run.report().get("data", {}), f"{run.report_file}: data"))
        figures |= {"parameters": count_parameters(net), "macs": count_macs(net)}
        exports.save_architecture(net, run.architecture)
        exports.save_weights(net, run.weights)
        figures["files"] = [run.architecture.name, run.weights.name]
    say(f"derive: {figures['note']}")


def train(run: Run, args: Namespace) -> None:
    """Trains the derived net on all training images, from inherited weights, from scratch, or from a checkpoint."""
    name = run.stage("space")["name"]
    scratch, prefix = getattr(args, "from_scratch", False), "train_" if args.command == "search" else ""
    config, every = config_of(TrainConfig, args, name, prefix=prefix), checkpoints_of(args)
    earlier = checkpoint.newest(run.folder, Training.kind)
    # `search --all --resume` may have been stopped before its training.
    resumed = args.resume and (args.command == "train" or earlier is not None)
    if earlier is not None and not resumed:
        raise ValueError(
            f"{run.folder}: holds an unfinished training ({earlier.relative_to(run.folder)}): add --resume to go on "
            f"with it, or remove {earlier.parent}"
        )
    with run.timed("train") as figures:
        plain = _load_derived(run, weights=False)
        splits, data_settings = _load_splits(run, args, name, plain.resolution, run.stage("data"), valid_fraction=0.0)
        _require_shape(plain, splits, data_settings["name"], run.architecture)
        torch.manual_seed(data_settings["seed"])
        net = _prepare(_load_derived(run, weights=not scratch), args)
        if resumed:
            training = Training.resume(run.folder, net, splits.train, every)
            _require_same(args, training.config.to_dict(), prefix)
        else:
            training = Training(net, splits.train, config, run.folder, every)
        training.fit()
        exports.describe(net, **_description(data_settings, "data"))
        if run.writes:
            exports.save_architecture(net, run.architecture)
            exports.save_weights(net, run.weights)
        figures |= {**training.config.to_dict(), "from_scratch": scratch, "files": [run.weights.name, "train.jsonl"]}
    training.discard()  # the weights have all that was worth it


def eval(run: Run, args: Namespace) -> None:
    """Top-1 and top-5 on the test images."""
    with run.timed("eval") as figures:
        net = _load_derived(run)
        settings = run.stage("data") if args.data is None else run.report().get("data", {})
        name = run.report().get("space", {}).get("name", "small")
        splits, data_settings = _load_splits(run, args, name, net.resolution, settings, valid_fraction=0.0)
        _require_shape(net, splits, data_settings["name"], run.architecture)
        accuracy = evaluate(_prepare(net, args), splits.test)
        figures |= {**asdict(accuracy), "data": data_settings["name"]}
    say(f"eval: top-1 {accuracy.top1:.2%}, top-5 {accuracy.top5:.2%} of {accuracy.images:,} test images")


def export(run: Run, args: Namespace) -> None:
    """Writes net.onnx, compares it with torch, and measures it."""
    with run.timed("export") as figures:
        net = _load_derived(run)
        figures["difference"] = exports.onnx(net, run.onnx)
        profiled = run.report().get("profile", {}).get("threads", 1)
        threads = profiled if args.threads is None else args.threads
        figures |= {"measured": measure(run.onnx, threads=threads, repeats=args.repeats), "threads": threads}
        figures["files"] = [run.onnx.name]
    say(f"export: {run.onnx}, {figures['measured']:.4g} ms in ONNX Runtime")


def _require_same(args: Namespace, started: Mapping[str, Any], prefix: str = "") -> None:
    """Raises ValueError for an option that what is resumed cannot change."""
    for name, value in _given(args, tuple(prefix + name for name in started)).items():
        was = started[name.removeprefix(prefix)]
        if name != "target" and value != was:
            option = f"--{name.replace('_', '-')}"
            raise ValueError(f"{option}: got {value} with --resume, expected {was} as it was started with")


def _given(args: Namespace, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: getattr(args, name) for name in names if getattr(args, name, None) is not None}


def _load_splits(
    run: Run, args: Namespace, space_name: str, resolution: Any, stored: dict[str, Any], **fixed: Any
) -> tuple[data.Splits, dict[str, Any]]:
    """Loaders, and the settings that load them again: options that were given, else the run's, else the space's."""
    recipe = {"rand_augment": None, "random_erasing": 0.0}
    own = {"name": defaults.DATA[space_name], "seed": 0, **recipe, **defaults.LOADER[space_name], **stored}
    if stored and "valid_fraction" not in fixed and stored.get("split", 1) != data.SPLIT:
        raise ValueError(
            f"{run.report_file}: the images were split as versions before 0.3.0 did, expected a search that was "
            "started with this one; --run FOLDER begins another"
        )
    given = {} if args.data is None else {"name": args.data}
    settings = own | given | _given(args, ("batch_size", "seed", "valid_fraction", "shift", *recipe))
    if settings["name"] is None:
        raise ValueError(f"--data: got none, expected an image folder for space {space_name!r}")
    options = {key: settings[key] for key in ("batch_size", "seed", "valid_fraction", *recipe)} | fixed
    splits = data.loaders(settings["name"], resolution=resolution, workers=args.workers, **options)
    if isinstance(splits.train, data.memory.MemoryLoader):
        splits.train.shift = settings["shift"]
    classes = list(splits.classes)
    if stored.get("classes", classes) != classes:
        raise ValueError(
            f"--data: {settings['name']} has other classes than the run was started with, expected "
            f"{_listed(stored['classes'])}, got {_listed(classes)}"
        )
    return splits, {**settings, "split": data.SPLIT, "classes": classes, "preprocessing": splits.preprocessing}


def _listed(names: list[str]) -> str:
    return f"{', '.join(plain(name) for name in names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"


def _description(data_settings: dict[str, Any], source: str) -> dict[str, Any]:
    """Of the settings of a run's data, what the nets of the run are described by; runs of older versions have none."""
    found = {key: data_settings.get(key) for key in ("classes", "preprocessing")}
    check(Description, found, source)
    return found


def _prepare(net: nn.Module, args: Namespace) -> nn.Module:
    return net.to(checks.device_of(args), memory_format=torch.channels_last)  # type: ignore[call-overload]


def _table(run: Run, path: str | None) -> LatencyTable:
    if path is None:
        return LatencyTable.load(run.need(run.latency, "profile"))
    table = LatencyTable.load(path)
    # derive reads the run's table, so it keeps the one that the search went by.
    if run.writes:
        table.save(run.latency)
    return table


def _load_derived(run: Run, weights: bool = True) -> nn.Module:
    net = exports.load_architecture(run.need(run.architecture, "derive"))
    _require_costs(net, run.report().get("derive", {}), run.architecture, run.report_file)
    if weights:
        with _naming(run.architecture):
            exports.load_weights(net, run.need(run.weights, "derive"))
    return net


def _require_same_search(run: Run, config: Mapping[str, Any], path: Path) -> None:
    """Raises ValueError where a checkpoint has other settings than report.json: one of the two is of another run."""
    searched = run.stage("search")
    for name, value in {**config, "target": config.get("target_ms", config.get("target"))}.items():
        if name in searched and searched[name] != value:
            raise ValueError(
                f"{path}: {name} is {short(value)}, expected {short(searched[name])} as in {run.report_file}"
            )


def _require_shape(net: Any, splits: data.Splits, name: str, architecture: Path) -> None:
    """Raises ValueError where images are not of the channels and classes that the net has."""
    for what, own, given in (
        ("classes", net.num_classes, splits.num_classes),
        ("channels", net.in_channels, splits.in_channels),
    ):
        if own != given:
            raise ValueError(f"{name}: has images of {given} {what}, expected {own} as the net of {architecture} has")


def _require_costs(net: nn.Module, said: Mapping[str, Any], architecture: Path, source: Path) -> None:
    """Raises ValueError where a file says other costs of the net than it has: one of the two files is of another."""
    try:
        costs = {"parameters": count_parameters(net), "macs": count_macs(net)}
    except ValueError as error:
        raise ValueError(f"{architecture}: {error}") from error
    for name, cost in costs.items():
        if name in said and said[name] != cost:
            raise ValueError(
                f"{source}: {name} must be {cost:,}, as the net of {architecture} has, got {short(said[name])}"
            )


@contextmanager
def _naming(description: Path) -> Iterator[None]:
    """Where weights or a latency table do not fit the net, the sentence also names the file that describes it."""
    try:
        yield
    except MissingKey as error:
        raise ValueError(f"{error}, which the space of {description} has") from error
    except ValueError as error:
        raise ValueError(
            str(error).replace("does not fit the net:", f"does not fit the net of {description}:")
        ) from error
