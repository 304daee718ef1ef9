"""Children of a process that has used the engine with several threads: they run, with one thread."""

import subprocess
import sys

import pytest

CODE = """
import os, sys, time, torch
import proxyless_fast as pf

torch.set_num_threads(2)
block, conv = pf.MBConv(32, 32), torch.nn.Conv2d(32, 32, 3)
x = torch.randn(16, 32, 56, 56)
expected = block(x).sum().item(), conv(x).sum().item()
children = []
for _ in range(5):
    child = os.fork()
    if child == 0:
        same = abs(conv(x).sum().item() - expected[1]) < 1e-1 and abs(block(x).sum().item() - expected[0]) < 1e-1
        os._exit(0 if same and torch.get_num_threads() == 1 else 3)
    children.append(child)
deadline, codes = time.monotonic() + 60, {}
while len(codes) < 5 and time.monotonic() < deadline:
    for child in children:
        if child not in codes:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                codes[child] = os.waitstatus_to_exitcode(status)
    time.sleep(0.02)
for child in children:
    if child not in codes:
        os.kill(child, 9)
print(sorted(codes.values()), torch.get_num_threads())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="fork as Linux has it")
def test_children_do_not_wait_for_threads_that_they_lack():
    run = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, timeout=120)
    assert run.stdout.strip() == "[0, 0, 0, 0, 0] 2", run.stderr[-500:]
