"""Speed and memory of search steps and blocks, beside every alternative, within one run: see run.py."""

import os

# Baselines take turns, in two memory formats: oneDNN's cache of generated code, 1024 entries by default, is too small
# for all of them at once, and peers would wait for their code again and again.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16384")
