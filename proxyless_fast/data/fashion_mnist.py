"""Where Fashion-MNIST (Xiao, Rasul, Vollgraf, 2017) comes from: a folder, Debian's package, or a checked download."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
import urllib.request
from pathlib import Path

from . import idx

log = logging.getLogger(__name__)

PACKAGE = "dataset-fashion-mnist"
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
LOCAL_FOLDER = Path("data/fashion-mnist")
MIRRORS = (
    "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/",
    "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
)
CLASSES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
LARGEST = 2**26  # bytes that are taken of a mirror: the largest file has 26 MB
# The digests that the dataset's authors publish for the gzipped files.
MD5 = {
    "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
    "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
    "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
    "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
}


class DataNotFound(FileNotFoundError):
    """A dataset that is not here and could not be had."""


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "proxyless_fast" / "fashion-mnist"


def fashion_mnist_folder() -> Path:
    """A folder that holds the four IDX files.

    The first of: `data/fashion-mnist` under the working directory, the cache, Debian's package; then the package is
    installed (where apt-get and root are there), then the files are downloaded into the cache. Raises DataNotFound
    with one message that names the three ways when none works.
    """
    for folder in (LOCAL_FOLDER, cache_folder(), DEBIAN_FOLDER):
        if idx.is_complete(folder):
            return folder
    reasons = []
    for way in (install_package, download):
        try:
            return way()
        except (OSError, subprocess.SubprocessError) as error:
            reasons.append(str(error))
    raise DataNotFound(
        f"Fashion-MNIST is not here; there are three ways to get it: put its four IDX files (gzipped or not) into "
        f"{LOCAL_FOLDER} or name their folder, install Debian's package {PACKAGE} ({reasons[0]}), or let it be "
        f"downloaded from {' or '.join(MIRRORS)} ({reasons[1]})."
    )


def install_package() -> Path:
    """Install Debian's package and return its folder; OSError or SubprocessError where that cannot be done."""
    if shutil.which("apt-get") is None or os.geteuid() != 0:
        raise OSError("not tried: that takes apt-get and root")
    log.info("installing the package %s", PACKAGE)
    install = ["apt-get", "install", "-y", "--no-install-recommends", PACKAGE]
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for before in ([], ["apt-get", "update"]):  # a fresh image has no package lists yet
        if before:
            subprocess.run(before, env=environment, capture_output=True, timeout=300)
        done = subprocess.run(install, env=environment, capture_output=True, text=True, timeout=600)
        if done.returncode == 0 and idx.is_complete(DEBIAN_FOLDER):
            return DEBIAN_FOLDER
    lines = done.stderr.strip().splitlines() or ["no reason given"]
    raise OSError(f"apt-get failed: {lines[-1]}")


def download() -> Path:
    """Download the four files into the cache, each checked before it takes its name; OSError when no mirror serves."""
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    for name, md5 in MD5.items():
        if not (folder / name).is_file():
            _download_file(name, md5, folder)
    return folder


def _download_file(name: str, md5: str, folder: Path) -> None:
    reasons = []
    for mirror in MIRRORS:
        log.info("downloading %s%s", mirror, name)
        try:
            # the address is one of ours, above
            with urllib.request.urlopen(mirror + name, timeout=30) as response:  # nosec B310
                content = response.read(LARGEST)
        except OSError as error:
            reasons.append(str(error))
            continue
        found = hashlib.md5(content, usedforsecurity=False).hexdigest()
        if found == md5:
            with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
                file.write(content)
            os.replace(file.name, folder / name)
            return
        reasons.append(f"{mirror}{name} has md5 {found}, expected {md5}")
    raise OSError("; ".join(dict.fromkeys(reasons)))
