"""The rows of `configs.TABLE`, one a line: data, written by hand or by `make tune-gpu`, which keeps this form."""

Row = tuple[int, str, str, int | None, dict[str, int], int, int, int]

# Where an architecture's rows come from: the card and the date, once they were measured.
SOURCES = {
    80: "chosen by the compiler's report, not measured",
    90: "chosen by the compiler's report, not measured",
}

# architecture, kernel, operands, widths up to (None: any), block sizes, warps, stages, programs of a reduction (about)
ROWS: tuple[Row, ...] = (
    (90, "gram", "half", 32, {"BM": 128, "BC": 32}, 4, 3, 2048),
    (90, "gram", "half", None, {"BM": 64, "BC": 64}, 4, 3, 2048),
    (90, "gram", "float", None, {"BM": 32, "BC": 32}, 4, 2, 2048),
    (90, "expand", "half", 64, {"BM": 128, "BN": 64, "BK": 64}, 8, 2, 2048),
    (90, "expand", "half", None, {"BM": 128, "BN": 128, "BK": 64}, 8, 3, 2048),
    (90, "expand", "float", None, {"BM": 64, "BN": 64, "BK": 16}, 8, 2, 2048),
    (90, "depthwise", "half", None, {"BM": 32, "BC": 64}, 4, 1, 2048),
    (90, "depthwise", "float", None, {"BM": 16, "BC": 32}, 4, 1, 2048),
    (90, "depthwise_backward", "half", None, {"BM": 16, "BC": 32}, 4, 1, 2048),
    (90, "depthwise_backward", "float", None, {"BM": 32, "BC": 32}, 4, 1, 2048),
    (90, "project", "half", 32, {"BM": 64, "BN": 32, "BK": 64}, 4, 3, 2048),
    (90, "project", "half", 64, {"BM": 64, "BN": 64, "BK": 64}, 4, 3, 2048),
    (90, "project", "half", None, {"BM": 64, "BN": 128, "BK": 64}, 4, 3, 2048),
    (90, "project", "float", 32, {"BM": 64, "BN": 32, "BK": 16}, 4, 2, 2048),
    (90, "project", "float", None, {"BM": 64, "BN": 64, "BK": 16}, 8, 2, 2048),
    (90, "project_backward", "half", 256, {"BM": 64, "BC": 64}, 8, 2, 2048),
    (90, "project_backward", "half", None, {"BM": 16, "BC": 64}, 8, 2, 2048),
    (90, "project_backward", "float", 128, {"BM": 32, "BC": 32}, 8, 2, 2048),
    (90, "project_backward", "float", 256, {"BM": 16, "BC": 32}, 8, 1, 2048),
    (90, "project_backward", "float", None, {"BM": 16, "BC": 16}, 8, 1, 2048),
    (90, "expand_once", "half", None, {"BM": 32, "BC": 64}, 8, 2, 2048),
    (90, "expand_once", "float", None, {"BM": 16, "BC": 64}, 8, 1, 2048),
    (90, "expand_weight", "half", 64, {"BM": 64, "BC": 64}, 8, 2, 2048),
    (90, "expand_weight", "half", 256, {"BM": 32, "BC": 64}, 8, 2, 2048),
    (90, "expand_weight", "half", None, {"BM": 16, "BC": 64}, 8, 2, 2048),
    (90, "expand_weight", "float", 64, {"BM": 32, "BC": 32}, 4, 2, 2048),
    (90, "expand_input", "half", 128, {"BM": 64, "BC": 64}, 8, 2, 2048),
    (90, "expand_input", "half", 256, {"BM": 32, "BC": 64}, 8, 2, 2048),
    (90, "expand_input", "half", None, {"BM": 32, "BC": 32}, 8, 2, 2048),
    (90, "expand_input", "float", 128, {"BM": 32, "BC": 16}, 4, 1, 2048),
    (90, "expand_input", "float", None, {"BM": 16, "BC": 16}, 8, 1, 2048),
    (90, "finish_input", "half", None, {"BM": 64, "BN": 64, "BK": 64}, 4, 2, 2048),
    (90, "finish_input", "float", None, {"BM": 64, "BN": 32, "BK": 16}, 4, 2, 2048),
    (90, "rows", "half", 64, {"BM": 64}, 4, 2, 2048),
    (90, "rows", "half", 256, {"BM": 16}, 4, 2, 2048),
    (90, "rows", "half", None, {"BM": 8}, 4, 2, 2048),
    (90, "rows", "float", 64, {"BM": 64}, 4, 2, 2048),
    (90, "rows", "float", 256, {"BM": 16}, 4, 2, 2048),
    (90, "rows", "float", None, {"BM": 8}, 4, 2, 2048),
    (80, "depthwise", "half", None, {"BM": 64, "BC": 64}, 8, 1, 2048),
    (80, "depthwise_backward", "half", None, {"BM": 8, "BC": 64}, 4, 1, 2048),
    (80, "expand_input", "float", 128, {"BM": 32, "BC": 16}, 8, 1, 2048),
    (80, "expand_input", "float", None, {"BM": 16, "BC": 16}, 8, 1, 2048),
    (80, "project_backward", "half", 128, {"BM": 64, "BC": 64}, 8, 2, 2048),
    (80, "project_backward", "half", None, {"BM": 16, "BC": 64}, 8, 2, 2048),
)
