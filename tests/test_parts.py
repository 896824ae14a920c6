"""Part i of n: one rule for machines that the user, torchrun, SLURM, Kubernetes or Ray starts; and what --engine ray says without Ray."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastbyol.__main__ import main
from fastbyol.config.errors import Lost, UserError
from fastbyol.ranks.parts import Part, parse_part
from fastbyol.ranks.ray_cluster import _one_line, require_answer
from tests.commands import ROOT

ENCODER = ROOT / "tests" / "golden" / "scenes_encoder.pt"


@given(total=st.integers(0, 10**9), count=st.integers(1, 500))
def test_the_parts_follow_each_other_without_gap_or_overlap_and_differ_by_one_at_most(total: int, count: int) -> None:
    parts = [Part(number, count).rows(total) for number in range(count)]
    assert (parts[0].start, parts[-1].stop) == (0, total)
    assert [part.stop for part in parts[:-1]] == [part.start for part in parts[1:]]
    sizes = {part.stop - part.start for part in parts}
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) >= 0


def test_the_number_of_the_machine_is_given_or_taken_from_torchrun_or_slurm() -> None:
    def parsed(text: str, **environment: str) -> Part:
        return parse_part(text, option="--shard", environment=environment)

    assert parsed("1/4") == Part(1, 4)
    assert parsed("auto", RANK="2", WORLD_SIZE="3", SLURM_PROCID="0", SLURM_NTASKS="9") == Part(2, 3)
    assert parsed("auto", SLURM_PROCID="7", SLURM_NTASKS="9") == Part(7, 9)
    with pytest.raises(UserError, match="--shard auto: neither torchrun's"):
        parsed("auto")
    with pytest.raises(UserError, match="part = '9/9': must be i/n"):
        parsed("auto", SLURM_PROCID="9", SLURM_NTASKS="9")


@pytest.mark.parametrize("text", ["4/4", "1", "/4", "1/", "-1/4", "a/4", "0/0", "1/2/3", "", "$SLURM_ARRAY_TASK_ID/8"])
def test_what_is_no_part_is_refused_with_the_options_name(text: str) -> None:
    with pytest.raises(UserError) as refused:
        parse_part(text, option="--rows", environment={})
    assert str(refused.value).startswith(f"--rows {text}: must be i/n with i from 0 to n - 1")


# --engine ray


@pytest.fixture
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where Ray is not installed, also where it is."""
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def _ends(arguments: list[object], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    with pytest.raises(SystemExit) as ended:
        main([str(each) for each in arguments])
    return int(ended.value.code or 0), capsys.readouterr().err


@pytest.mark.usefixtures("without_ray")
def test_without_ray_one_line_names_the_extra_and_nothing_is_written(
    image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in (
        ["convert", "--data", image_folder, "--to", "dali", "--out", tmp_path / "shards", "--engine", "ray"],
        ["embed", "--checkpoint", ENCODER, "--data", image_folder, "--out", tmp_path / "rows.npz", "--engine", "ray"],
    ):
        code, said = _ends(command, capsys)
        assert code == 2
        assert said.splitlines()[-1].startswith("fastbyol: error: --engine ray: Ray is not installed")
        assert said.endswith("pip install 'fastbyol[ray]'\n")
        assert "Traceback" not in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--to", "dali", "--parts", "4"], "--parts: has an effect with --engine ray only"),
        (["--to", "dali", "--engine", "ray", "--shard", "0/4"], "--shard: does not go with --engine ray"),
        (["--to", "dali", "--engine", "ray", "--overwrite"], "--overwrite does not go with --engine ray"),
        (["--to", "dali", "--engine", "ray", "--resume"], "--resume does not go with --engine ray"),
        (["--to", "dali", "--engine", "ray", "--parts", "0"], "parts = 0: must be a number >= 1"),
        (["--to", "dali", "--engine", "ray", "--merge"], "--engine: has no effect with --merge"),
        (["--to", "ffcv", "--engine", "ray"], "--engine: has no effect on a .beton; leave it out, or --to dali"),
        (["--to", "dali", "--engine", "spark"], "invalid choice: 'spark'"),
    ],
)
def test_what_does_not_go_with_an_engine_is_refused(
    options: list[str], said: str, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, err = _ends(["convert", "--data", image_folder, "--out", tmp_path / "x", *options], capsys)
    assert code == 2
    assert err.startswith(f"fastbyol: error: {said}") or said in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("address", ["127.0.0.1:1", "[::1]:1", "127.0.0.1:99999"])
def test_a_cluster_that_does_not_answer_is_named_at_once(address: str) -> None:
    with pytest.raises(
        UserError, match=r"RAY_ADDRESS = .*:\d+: no cluster of this version of Ray answers there .*; start one with ray start --head"
    ):
        require_answer(address)


def test_an_error_of_ours_comes_out_of_rays_own_error_with_its_own_words() -> None:
    """Ray raises an error that is both its own and of our class, whose text is a coloured traceback; ours is its cause."""

    class RayError(Exception):
        pass

    class RayTaskError(RayError):
        pass

    class UserCodeException(RayError):
        pass

    class Refused(UserError):
        """As a more special error of ours."""

    class Dual(RayTaskError, UserError):
        def __init__(self, cause: Exception) -> None:
            super().__init__("\x1b[36mray::_part()\x1b[39m (pid=77)\nTraceback")
            self.cause = cause

    ray = SimpleNamespace(exceptions=SimpleNamespace(RayError=RayError, RayTaskError=RayTaskError, UserCodeException=UserCodeException))
    for ours in (UserError("/data: no such folder"), Refused("/data: no such folder\nand settings of Ray's")):
        found = _one_line(ray, Dual(ours))
        assert (type(found), str(found)) == (UserError, "/data: no such folder")
    found = _one_line(ray, RayError("node died"))
    assert isinstance(found, Lost)
