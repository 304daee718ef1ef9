"""README and docs say what is there: every link leads somewhere, and every file and command that they name exists."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / ".github").rglob("*.md")])
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
# In code font: a path with a folder and an ending, or in one of our folders, such as `benchmarks/gpu/`.
NAMED = re.compile(
    r"`((?:[\w.-]+/)+[\w.-]*\.(?:py|cpp|cu|cuh|h|md|sh|yml|toml))`"
    r"|`((?:csrc|docs|tests|examples|benchmarks)/[\w./-]*)`"
)
MODULE = re.compile(r"python -m ((?:benchmarks|proxyless_fast)[\w.]*)")
TARGET = re.compile(r"`make ([a-z-]+)")
PLACES = (ROOT, ROOT / "proxyless_fast", ROOT / "csrc")


def anchors(text: str) -> set[str]:
    """Of a page's headings, as GitHub and mkdocs make them."""
    heads = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.replace("`", "").lower()).strip().replace(" ", "-") for head in heads}


def dead(page: Path, text: str) -> list[str]:
    """What a page names and nobody has."""
    found = []
    prose = re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)
    for link in LINK.findall(prose):
        if re.match(r"[a-z]+:", link):
            continue  # another host: not asked from a test
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists():
            found.append(f"link to {link}")
        elif anchor and anchor not in anchors(target.read_text(encoding="utf-8") if path else text):
            found.append(f"anchor {link}")
    for match in NAMED.finditer(text):
        name = match[1] or match[2]
        if "NAME" not in name and not any((place / name).exists() for place in PLACES):
            found.append(f"file {name}")
    for module in MODULE.findall(text):
        path = ROOT / module.rstrip(".").replace(".", "/")
        if not path.with_suffix(".py").is_file() and not (path / "__main__.py").is_file():
            found.append(f"module {module}")
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    found += [f"target make {name}" for name in TARGET.findall(text) if name not in targets]
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_nothing_named_is_missing(page):
    assert dead(page, page.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "text",
    [
        "[a](no.md)", "[a](README.md#no-such-heading)", "[a](#nor-this)", "`csrc/no.cpp`", "`docs/no.md`",
        "`search/no.py`",
        "python -m benchmarks.no", "`make nothing`",
    ],
)  # fmt: skip
def test_what_is_missing_is_found(text):
    assert len(dead(ROOT / "README.md", text)) == 1


def test_the_changelog_is_of_this_version():
    version = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert version and f"## {version[1]}\n" in (ROOT / "CHANGELOG.md").read_text()
