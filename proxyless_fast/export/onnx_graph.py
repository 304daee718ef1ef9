"""ONNX graphs built module by module, in milliseconds where torch's exporter takes about half a second a block.

The profiler needs a graph of every block of a space, and what it measures should be what `export.onnx` writes: both
come from here. Modules of other types go through torch's exporter.
"""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from ..blocks import ConvLayer, DepthConv, Identity, LinearLayer, MBConv, Pool, ReluConv, ResidualBlock, Zero
from ..candidates import has_hooks
from ..io.text import said
from ..spaces.cell_net import EDGES, Cell, CellNet, Reduction
from ..spaces.chain_net import ChainNet

log = logging.getLogger(__name__)

# The oldest that can say every block of ours, which runtimes on devices still read; converters bring it to newer ones.
OPSET, IR_VERSION = 11, 6
TRACED_OPSET = 18  # the oldest that torch's exporter writes by itself


class Unsupported(TypeError):
    """A module type this builder has no ONNX form for."""


class OnnxGraph:
    """Nodes and initializers of one graph under construction; values are referred to by name."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, onnx.TensorProto] = {}

    def node(self, op: str, *inputs: str, **attributes: Any) -> str:
        output = f"{op.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [output], name=output, **attributes))
        return output

    def constant(self, name: str, value: Tensor | np.ndarray | float) -> str:
        array = value.detach().cpu().float().numpy() if isinstance(value, Tensor) else np.asarray(value, np.float32)
        if name not in self.initializers:
            self.initializers[name] = numpy_helper.from_array(np.ascontiguousarray(array), name)
        return name

    def model(self, input_shape: Iterable[int | str], output: str) -> onnx.ModelProto:
        """The checked model from the float32 value `input` to `output`, which the value named here becomes."""
        if self.nodes and self.nodes[-1].output[0] == output:
            self.nodes[-1].output[0] = "output"
        else:
            self.nodes.append(helper.make_node("Identity", [output], ["output"], name="identity"))
        graph = helper.make_graph(
            self.nodes,
            "proxyless_fast",
            [helper.make_tensor_value_info("input", TensorProto.FLOAT, list(input_shape))],
            [helper.make_tensor_value_info("output", TensorProto.FLOAT, None)],
            list(self.initializers.values()),
        )
        model = helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", OPSET)],
            ir_version=IR_VERSION,
            producer_name="proxyless_fast",
        )
        model = onnx.shape_inference.infer_shapes(model)
        onnx.checker.check_model(model)
        return model


def build(module: nn.Module, input_shape: Sequence[int], dynamic_batch: bool = False) -> onnx.ModelProto:
    """The ONNX model of a module in evaluation, float32, one input (B, C, H, W) called `input`, one output `output`.

    input_shape: (C, H, W). The batch is 1, or the symbol `batch`. A net with modules this builder does not know is
    traced by torch's exporter, in its own opset. Raises ValueError where that cannot be done.
    """
    graph = OnnxGraph()
    try:
        output = emit(module, graph, "input")
    except Unsupported as reason:
        log.warning("%s: torch's exporter writes the net, in opset %d", reason, TRACED_OPSET)
        return _trace(module, input_shape, dynamic_batch)
    return graph.model(["batch" if dynamic_batch else 1, *input_shape], output)


def input_shape_of(net: nn.Module, given: Sequence[int] | None = None) -> tuple[int, int, int]:
    """(C, H, W): what was given, else the net's own in_channels and resolution; ValueError where neither tells."""
    if given is None:
        channels, side = getattr(net, "in_channels", None), getattr(net, "resolution", None)
        if not isinstance(channels, int) or not isinstance(side, int):
            raise ValueError(f"input_shape must be given for a {type(net).__name__}")
        return channels, side, side
    if len(given) != 3 or not all(isinstance(size, int) and size > 0 for size in given):
        raise ValueError(f"input_shape must be (channels, height, width), got {tuple(given)}")
    channels, height, width = given
    return channels, height, width


def plain_copy(net: nn.Module) -> nn.Module:
    """What is written: a copy of the net on the CPU, in float32 and in evaluation."""
    return copy.deepcopy(net).cpu().float().eval()


def example_output(net: nn.Module, input_shape: Sequence[int], batch: int = 1) -> tuple[Tensor, Tensor]:
    """A random input (batch, *input_shape) and what the plain net makes of it, a tensor.

    Raises ValueError for a net that does not take one such input, or gives something else than one tensor.
    """
    x = torch.randn(batch, *input_shape, generator=torch.Generator().manual_seed(batch))
    parameters = inspect.signature(net.forward).parameters.values()
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    wanted = [p.name for p in parameters if p.default is p.empty and (p.kind in kinds or p.kind is p.KEYWORD_ONLY)]
    if len(wanted) > 1:
        raise ValueError(f"net must take one input, and the forward of {type(net).__name__} takes {', '.join(wanted)}")
    try:
        with torch.no_grad():
            output = net(x)
    except Exception as error:  # what a net of a user raises
        raise ValueError(f"net does not take an input of shape {tuple(x.shape)}: {said(error)}") from error
    if not isinstance(output, Tensor):
        raise ValueError(f"net must give one tensor, got a {type(output).__name__} from {type(net).__name__}")
    return x, output


def _trace(module: nn.Module, input_shape: Sequence[int], dynamic_batch: bool) -> onnx.ModelProto:
    module = plain_copy(module)
    # a traced size of 1 would be taken for a constant
    example, _ = example_output(module, input_shape, 2 if dynamic_batch else 1)
    dynamic_shapes = ({0: torch.export.Dim("batch")},) if dynamic_batch else None
    try:
        program = torch.onnx.export(
            module, (example,), dynamo=True, verbose=False, opset_version=TRACED_OPSET,
            input_names=["input"], output_names=["output"], dynamic_shapes=dynamic_shapes,
        )  # fmt: skip
    except Exception as error:  # torch's exporter has many of its own, each around what was wrong
        reason = said(error.__cause__ if isinstance(error.__cause__, Exception) else error)
        raise ValueError(f"torch cannot write {type(module).__name__} as ONNX: {reason}") from error
    assert program is not None
    return program.model_proto


def _pair(value: int | tuple[int, ...]) -> list[int]:
    return [value, value] if isinstance(value, int) else list(value)


Writer = Callable[..., str]
_WRITERS: dict[type, Writer] = {}


def writes(*kinds: type) -> Callable[[Writer], Writer]:
    """Register what appends modules of exactly these types; a subclass may have another forward."""

    def register(writer: Writer) -> Writer:
        _WRITERS.update(dict.fromkeys(kinds, writer))
        return writer

    return register


def emit(module: nn.Module, graph: OnnxGraph, x: str, name: str = "") -> str:
    """Append the inference form of `module`, applied to the value `x`, and return the name of its output.

    `name` is the module's place in the net and prefixes its parameters, as in a state dict. Raises Unsupported for a
    type without a writer, and for a module with hooks or a forward of its own.
    """
    writer = _WRITERS.get(type(module))
    if writer is None or has_hooks(module) or "forward" in module.__dict__:
        raise Unsupported(f"no ONNX form for {type(module).__name__} ({name or 'the module itself'}), as it is")
    return writer(module, graph, x, name)


def _join(name: str, child: str) -> str:
    return f"{name}.{child}" if name else child


@writes(nn.Sequential, nn.ModuleList, ConvLayer, DepthConv, ReluConv, LinearLayer, Pool)
def emit_children(module: nn.Module, graph: OnnxGraph, x: str, name: str = "") -> str:
    """For modules whose forward applies their children in order."""
    for child_name, child in module.named_children():
        x = emit(child, graph, x, _join(name, child_name))
    return x


@writes(MBConv)
def _(module: MBConv, graph: OnnxGraph, x: str, name: str = "") -> str:
    for group in ("inverted_bottleneck", "depth_conv", "point_linear"):  # what its forward runs, whatever else it holds
        child = getattr(module, group)
        x = x if child is None else emit(child, graph, x, _join(name, group))
    return x


@writes(nn.Identity, Identity, nn.Dropout)
def _(module: nn.Module, graph: OnnxGraph, x: str, name: str = "") -> str:
    return x


@writes(nn.Conv2d)
def _(module: nn.Conv2d, graph: OnnxGraph, x: str, name: str = "") -> str:
    if module.padding_mode != "zeros" or isinstance(module.padding, str):
        raise Unsupported(f"no ONNX form for padding {module.padding!r}, mode {module.padding_mode!r} ({name})")
    parameters = [graph.constant(_join(name, "weight"), module.weight)]
    if module.bias is not None:
        parameters.append(graph.constant(_join(name, "bias"), module.bias))
    return graph.node(
        "Conv", x, *parameters,
        kernel_shape=_pair(module.kernel_size), strides=_pair(module.stride), pads=_pair(module.padding) * 2,
        dilations=_pair(module.dilation), group=module.groups,
    )  # fmt: skip


@writes(nn.BatchNorm2d)
def _(module: nn.BatchNorm2d, graph: OnnxGraph, x: str, name: str = "") -> str:
    mean, var = module.running_mean, module.running_var
    if mean is None or var is None or module.weight is None:
        raise Unsupported(f"no ONNX form for a batch norm without running statistics or affine weights ({name})")
    names = ("weight", "bias", "running_mean", "running_var")
    parameters = [graph.constant(_join(name, key), getattr(module, key)) for key in names]
    return graph.node("BatchNormalization", x, *parameters, epsilon=module.eps)


@writes(nn.ReLU6)
def _(module: nn.ReLU6, graph: OnnxGraph, x: str, name: str = "") -> str:
    low, high = (graph.constant(f"bound_{float(v)!r}", float(v)) for v in (module.min_val, module.max_val))
    return graph.node("Clip", x, low, high)


@writes(nn.ReLU)
def _(module: nn.ReLU, graph: OnnxGraph, x: str, name: str = "") -> str:
    return graph.node("Relu", x)


@writes(nn.AvgPool2d)
def _(module: nn.AvgPool2d, graph: OnnxGraph, x: str, name: str = "") -> str:
    if module.divisor_override is not None:
        raise Unsupported(f"no ONNX form for a pooling with a divisor of its own ({name})")
    return graph.node(
        "AveragePool", x, kernel_shape=_pair(module.kernel_size), strides=_pair(module.stride),
        pads=_pair(module.padding) * 2, ceil_mode=int(module.ceil_mode),
        count_include_pad=int(module.count_include_pad),
    )  # fmt: skip


@writes(nn.MaxPool2d)
def _(module: nn.MaxPool2d, graph: OnnxGraph, x: str, name: str = "") -> str:
    if module.return_indices:
        raise Unsupported(f"no ONNX form for a pooling that returns indices ({name})")
    return graph.node(
        "MaxPool", x, kernel_shape=_pair(module.kernel_size), strides=_pair(module.stride),
        pads=_pair(module.padding) * 2, dilations=_pair(module.dilation), ceil_mode=int(module.ceil_mode),
    )  # fmt: skip


@writes(nn.AdaptiveAvgPool2d)
def _(module: nn.AdaptiveAvgPool2d, graph: OnnxGraph, x: str, name: str = "") -> str:
    if module.output_size not in (1, (1, 1)):
        raise Unsupported(f"no ONNX form for adaptive pooling to {module.output_size} ({name})")
    return graph.node("GlobalAveragePool", x)


@writes(nn.Flatten)
def _(module: nn.Flatten, graph: OnnxGraph, x: str, name: str = "") -> str:
    if (module.start_dim, module.end_dim) != (1, -1):
        raise Unsupported(f"no ONNX form for flattening {module.start_dim} to {module.end_dim} ({name})")
    return graph.node("Flatten", x, axis=module.start_dim)


@writes(nn.Linear)
def _(module: nn.Linear, graph: OnnxGraph, x: str, name: str = "") -> str:
    parameters = [graph.constant(_join(name, "weight"), module.weight)]
    if module.bias is not None:
        parameters.append(graph.constant(_join(name, "bias"), module.bias))
    return graph.node("Gemm", x, *parameters, transB=1)


@writes(nn.SiLU)
def _(module: nn.SiLU, graph: OnnxGraph, x: str, name: str = "") -> str:
    return graph.node("Mul", x, graph.node("Sigmoid", x))


@writes(nn.Hardswish)
def _(module: nn.Hardswish, graph: OnnxGraph, x: str, name: str = "") -> str:
    return graph.node("Mul", x, graph.node("HardSigmoid", x, alpha=1 / 6, beta=0.5))  # HardSwish came with opset 14


@writes(Zero)
def _(module: Zero, graph: OnnxGraph, x: str, name: str = "") -> str:
    if module.stride != 1 or module.out_channels is not None:
        raise Unsupported(f"no ONNX form for a Zero that changes the shape ({name})")
    return graph.node("Mul", x, graph.constant("zero", 0.0))


@writes(ResidualBlock)
def _(module: ResidualBlock, graph: OnnxGraph, x: str, name: str = "") -> str:
    op = module.mobile_inverted_conv
    if module.shortcut and isinstance(op, Zero):
        return x
    y = emit(op, graph, x, _join(name, "mobile_inverted_conv"))
    return graph.node("Add", y, x) if module.shortcut else y


@writes(ChainNet)
def _(module: ChainNet, graph: OnnxGraph, x: str, name: str = "") -> str:
    x = emit(module.first_conv, graph, x, _join(name, "first_conv"))
    x = emit(module.blocks, graph, x, _join(name, "blocks"))
    x = emit(module.feature_mix_layer, graph, x, _join(name, "feature_mix_layer"))
    x = graph.node("Flatten", graph.node("GlobalAveragePool", x), axis=1)
    return emit(module.classifier, graph, x, _join(name, "classifier"))


@writes(Cell)
def _(module: Cell, graph: OnnxGraph, x: str, name: str = "") -> str:
    nodes = [x]
    edges = list(zip(EDGES, module.edges, strict=True))
    for node in range(1, 4):
        incoming = [(i, source, op) for i, ((source, target), op) in enumerate(edges) if target == node]
        # a sum leaves its zeros out, unless there is nothing else
        summed = [term for term in incoming if not isinstance(term[2], Zero)] or incoming[:1]
        terms = [emit(op, graph, nodes[source], _join(name, f"edges.{i}")) for i, source, op in summed]
        total = terms[0]
        for term in terms[1:]:
            total = graph.node("Add", total, term)
        nodes.append(total)
    return nodes[-1]


@writes(Reduction)
def _(module: Reduction, graph: OnnxGraph, x: str, name: str = "") -> str:
    shortcut = emit(module.downsample, graph, x, _join(name, "downsample"))
    y = emit(module.conv_a, graph, x, _join(name, "conv_a"))
    return graph.node("Add", shortcut, emit(module.conv_b, graph, y, _join(name, "conv_b")))


@writes(CellNet)
def _(module: CellNet, graph: OnnxGraph, x: str, name: str = "") -> str:
    x = emit(module.stem, graph, x, _join(name, "stem"))
    x = emit(module.body, graph, x, _join(name, "body"))
    x = emit(module.lastact, graph, x, _join(name, "lastact"))
    x = graph.node("Flatten", graph.node("GlobalAveragePool", x), axis=1)
    return emit(module.classifier, graph, x, _join(name, "classifier"))
