"""The chosen architecture, one line per block."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from ..supernet import mixed_ops

BAR = 10


def describe_blocks(net: nn.Module, choices: Mapping[str, int]) -> list[dict[str, Any]]:
    """Of each mixed op of a supernet with `layers()`, in order: what was chosen, its shape and its probability.

    choices: label to index. Each dict has label, name, probability, and where the choice has a cost also input and
    output (height, width, channels), the attributes of its latency key (expand, kernel, stride, ...), macs, parameters.
    """
    labels = {id(op): label for label, op in mixed_ops(net).items()}
    blocks = []
    for layer in net.layers():  # type: ignore[operator]
        if layer.mixed is None:
            continue
        label = labels[id(layer.mixed)]
        index = choices[label]
        shape = layer.choices[index]
        block: dict[str, Any] = {
            "label": label,
            "name": layer.mixed.names[index],
            "probability": layer.mixed.probabilities()[index].item(),
        }
        if shape is not None:
            block |= {"input": list(shape.input), "output": list(shape.output), **dict(shape.attributes)}
            block |= {"macs": shape.macs, "parameters": shape.parameters}
        blocks.append(block)
    return blocks


def block_lines(blocks: list[dict[str, Any]], ascii_only: bool = False) -> list[str]:
    """One line per block: label, name, size, channels, stride, expand and kernel where it has them, probability bar.

    ascii_only: for a terminal that could not show the bar's blocks.
    """
    width = max((len(block["label"]) for block in blocks), default=0)
    return [
        f"{block['label']:<{width}}  {_operation(block)}  {_bar(block['probability'], ascii_only)}" for block in blocks
    ]


def _operation(block: dict[str, Any]) -> str:
    if "input" not in block:
        note = "removed" if block["name"] == "Zero" else "costs nothing"
        return f"{block['name']:<14} {note:<55}"
    (height, width, cin), out = block["input"], block["output"]
    parts = [f"{height}x{width}", f"{cin:>3} -> {out[-1]:<3}", f"stride {block.get('stride', 1)}"]
    parts += [f"{name} {block[name]}" for name in ("kernel", "expand") if name in block]
    return f"{block['name']:<14} {'  '.join(parts):<55}"


def _bar(probability: float, ascii_only: bool) -> str:
    full, (dark, light) = round(BAR * probability), "#." if ascii_only else "█░"
    return f"{dark * full}{light * (BAR - full)} {probability:.2f}"
