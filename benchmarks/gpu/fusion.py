"""Where expand and depthwise in one launch pay: a roofline table, a model and no measurement.

Two launches write e and read it again; one makes it in shared memory, and its halo again in every tile. Taken against
the one: tensor cores at half their peak, no overlap of their time with the stencil's, 8 float32 operations for the
norm, activation and rounding of each element (behind the memory's time in two launches), x read again by every chunk of
32 channels at twice the memory's rate, and the halo of the smallest tiles (`traffic.halo`).
"""

from __future__ import annotations

from proxyless_fast.ops.gpu.host.stencils import expansion_pays

from .shapes import BlockShape, imagenet
from .traffic import CARDS, Card, halo

CHUNK, EPILOGUE = 32, 8


def times(s: BlockShape, card: Card, backward: bool) -> tuple[float, float]:
    """Seconds of (two launches, one) in half precision: e and d, or de and dw with e made again."""
    out = (s.size - 1) // s.stride + 1
    pixels, outputs = s.batch * s.size**2, s.batch * out**2
    x, e, d = 2 * pixels * s.ci, 2 * pixels * s.ch, 2 * outputs * s.ch
    moved = 2 * d + e if backward else d  # dz, d and de; or d: besides e or x
    stencil = (2 if backward else 1) * 2 * s.kernel**2 * outputs * s.ch / card.single
    products = 2 * pixels * (-(-s.ci // 16) * 16) * s.ch / (card.half / 2)
    epilogue = EPILOGUE * pixels * s.ch / card.single
    again = 1.0 if backward else halo(s.size, s.size, s.kernel, s.stride)
    two = max((x + e) / card.memory, products) + max((e + moved) / card.memory, stencil)
    chunks = -(-s.ch // CHUNK)
    reread = chunks * again * x / (2 * card.memory)
    return two, max((x + moved) / card.memory, reread, again * (products + epilogue) + stencil)


def every_mbconv() -> list[BlockShape]:
    """Every MBConv of the ImageNet space, batch 64, equal layers once."""
    layers = dict.fromkeys((s.ci, s.size, s.stride) for s in imagenet(64))
    return [shape for ci, n, stride in layers for shape in BlockShape(64, ci, ci, n, 7, stride, 6).layer()]


def table() -> str:
    """Markdown: microseconds of two launches and of one, bold where `expansion_pays` takes the one; e = 6."""
    ways = " | ".join(f"{card.name} {way}" for card in CARDS for way in ("forward", "backward"))
    lines = [f"| in, size, stride | k | halo | {ways} |", "|---|---|---|" + "---|" * 2 * len(CARDS)]
    for s in (s for s in every_mbconv() if s.expand == 6):
        cells = []
        for card in CARDS:
            pays = expansion_pays(s.ci, s.kernel, s.stride, card.arch)
            for backward in (False, True):
                two, one = (f"{t * 1e6:.0f}" for t in times(s, card, backward))
                cells.append(f"{two}, **{one}**" if pays else f"{two}, {one}")
        again = halo(s.size, s.size, s.kernel, s.stride)
        lines.append(f"| {s.ci}, {s.size}², {s.stride} | {s.kernel} | {again:.2f} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
