"""The tuner of the GPU kernels' table without a GPU: its candidates, the compiler's verdicts, and what it writes."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from benchmarks.gpu import trials, tune
from benchmarks.gpu.shapes import BlockShape
from proxyless_fast.ops.gpu.host import configs, launch, table
from proxyless_fast.ops.gpu.host.configs import WIDE, Config
from tests.benchmarks.gpu.fakes import LAYER, Host, make_session, printed


def test_candidates_are_few_and_near():
    for by_operands in configs.TABLE[90].values():
        for _, config in (row for listed in by_operands.values() for row in listed):
            found = trials.neighbours(config)
            assert found[0] == config and len(found) <= 60
            keys = {(tuple(c.tile.items()), *c[1:]) for c in found}
            assert len(keys) == len(found)
            for c in found:
                sizes = list(zip(c.tile.values(), config.tile.values(), strict=True))
                assert sum(a != b for a, b in (*sizes, (c.warps, config.warps), (c.stages, config.stages))) <= 2
                assert all(a in (b // 2, b, 2 * b) and a >= 8 for a, b in sizes)
                assert c.warps in (2, 4, 8) and c.stages in (1, 2, 3, 4) and c.programs == config.programs


def test_what_is_cut_to_the_same_block_is_tried_once():
    place = trials.Place(90, "gram", "half", 32)
    tried = [config for config, _ in trials.trials(place, [LAYER])]
    assert tried[0] == place.config and not any(c.tile["BC"] > 32 for c in tried)  # the layer has 24 channels
    assert any(c.tile["BC"] == 16 for c in tried) and any(c.tile["BM"] == 256 for c in tried)


def verdict(place, config, layer, scratch):
    of = [trials.launches(place, c, [layer]) for c in (config, place.config)]
    return trials.verdict(place, *of, scratch)


def test_the_compiler_drops_what_spills_or_is_too_large(tmp_path, monkeypatch):
    place = trials.Place(80, "depthwise_backward", "half", WIDE)
    layer = BlockShape(64, 192, 320, 7, 7, 1, 6)
    taken, why = verdict(place, Config({"BM": 16, "BC": 32}, 4, 1), layer, tmp_path)
    assert not taken and why.startswith("spills")
    assert verdict(place, place.config, layer, tmp_path)[0]
    place = trials.Place(80, "expand", "half", WIDE)
    taken, why = verdict(place, Config({"BM": 128, "BN": 128, "BK": 128}, 8, 4), layer, tmp_path)
    assert not taken and "shared memory" in why
    place = trials.Place(90, "gram", "half", WIDE)
    taken, why = verdict(place, Config({"BM": 24, "BC": 64}, 4, 2), layer, tmp_path)
    assert not taken and why.startswith("does not compile")


def test_a_candidate_that_changes_which_passes_run_is_dropped(tmp_path):
    place = trials.Place(90, "expand_once", "half", WIDE)  # with half the channels a program, it is not chosen
    taken, why = verdict(place, Config({"BM": 32, "BC": 32}, 8, 2), LAYER, tmp_path)
    assert not taken and "other passes" in why


def test_a_dry_run_lists_candidates_and_verdicts(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tune, "imagenet", lambda batch: [LAYER])
    few = [Config({"BM": 64, "BN": 64, "BK": 64}, 4, 2), Config({"BM": 48, "BN": 64, "BK": 64}, 4, 2)]
    monkeypatch.setattr(trials, "neighbours", lambda config: few)
    before = Path(table.__file__).read_text()
    assert tune.main(["--dry-run", "--kernels", "finish_input"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 * (1 + len(few))  # half and float
    assert lines[0] == "sm_90 finish_input half any width"
    assert "registers" in lines[1] and "dropped" not in lines[1] and "does not compile" in lines[2]
    assert Path(table.__file__).read_text() == before


@pytest.fixture
def tuning(tmp_path, monkeypatch):
    """tuning(times): a tuner on a device where a launch takes times(config) seconds; gives the table that it writes."""
    for arch, kernels in configs.TABLE.items():
        monkeypatch.setitem(configs.TABLE, arch, {kernel: dict(rows) for kernel, rows in kernels.items()})
    near = trials.neighbours
    monkeypatch.setattr(trials, "neighbours", lambda config: near(config)[:12])  # those with one change
    fits = lambda launched: all(one.config.warps > 2 for some in launched.values() for one in some)  # noqa: E731
    monkeypatch.setattr(trials, "verdict", lambda place, launched, *_: (fits(launched), ""))
    ran = []
    monkeypatch.setattr(launch, "run", lambda kernel, grid, config, *args, **constants: ran.append(config))

    def run_tuner(times, arch=90, kernels=("project",)):
        class Device(Host):
            def time(self, call, cold=False):
                call()
                return times(ran[-1])

        path = tmp_path / "table.py"
        path.write_text(Path(table.__file__).read_text())
        session = make_session(tmp_path, Device(), device="meta")
        tune.tune(session, arch, list(kernels), "A card", [LAYER, BlockShape(64, 192, 320, 7, 7, 1, 6)], path)
        written: dict = {}
        exec(path.read_text(), written)
        return written, printed(session)

    return run_tuner


def test_the_fastest_is_written_and_nothing_else_changes(tuning):
    written, said = tuning(lambda config: 1e-3 / config.tile["BM"])
    before, after = configs.table_of(table.ROWS), configs.table_of(written["ROWS"])
    old, new = before[90]["project"]["half"], after[90]["project"]["half"]
    for place in (0, 2):  # the rows of 24 and of 320 outputs
        assert new[place][1] == old[place][1]._replace(tile=old[place][1].tile | {"BM": 128})
    assert new[1] == old[1] and [limit for limit, _ in new] == [limit for limit, _ in old]
    for kernel in before[90]:
        if kernel != "project":
            assert after[90][kernel] == before[90][kernel]
    assert after[80] == before[80]  # what it had from sm_90 by default is its own now
    assert "A card" in written["SOURCES"][90] and written["SOURCES"][80] == table.SOURCES[80]
    assert "of its time" in said


def test_a_row_is_kept_where_nothing_is_faster(tuning):
    written, said = tuning(lambda config: 1e-5 if config.warps == 4 else 0.99e-5)
    assert configs.table_of(written["ROWS"]) == configs.table_of(table.ROWS)
    assert "kept" in said


def test_a_card_that_is_not_in_the_table_gets_rows_of_its_own(tuning):
    written, _ = tuning(lambda config: 1e-3 / config.tile["BM"], arch=89, kernels=("expand",))
    before, after = configs.table_of(table.ROWS), configs.table_of(written["ROWS"])
    assert {row[1] for row in written["ROWS"] if row[0] == 89} == {"expand"}
    assert after[89]["project_backward"] == before[80]["project_backward"]
    assert after[80] == before[80] and after[90] == before[90]


def test_only_the_launches_of_the_row_happen():
    layer = BlockShape(64, 40, 40, 28, 7, 1, 6)
    place = trials.Place(90, "expand_weight", "half", 64)
    found = trials.launches(place, place.config._replace(warps=2), [layer])
    assert {one.name for one in found[layer]} == {"expand_backward"}
    assert {one.config.warps for one in found[layer]} == {2}
    assert configs.TABLE[90]["expand_weight"]["half"][0][1].warps != 2
    wider = trials.Place(90, "expand_weight", "half", 256)
    assert not trials.launches(wider, wider.config, [layer])


def test_the_table_is_written_in_its_own_form():
    text = Path(table.__file__).read_text()
    assert tune.render(text, table.SOURCES, table.ROWS) == text
    assert text.count("\n    (") == len(table.ROWS)
    assert all(len(line) <= 120 for line in text.splitlines())


def test_every_row_of_the_table_can_be_found():
    for kernels in configs.TABLE.values():
        for by_operands in kernels.values():
            for listed in by_operands.values():
                limits = [limit for limit, _ in listed]
                assert limits == sorted(set(limits))
    assert configs.config("expand", torch.bfloat16, 96, 90, BK=24).tile["BK"] == 32
