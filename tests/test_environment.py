from __future__ import annotations

import pytest

from msqkd import environment
from msqkd.environment import NOTE, OK, PROBLEM, examine, versions


def finding(name: str) -> environment.Finding:
    return next(f for f in examine() if f.name == name)


def installed(monkeypatch: pytest.MonkeyPatch, **packages: str | None) -> None:
    real = environment.version_of
    monkeypatch.setattr(environment, "version_of", lambda name: packages[name] if name in packages else real(name))


def test_a_sound_environment_has_no_problem() -> None:
    assert {f.name for f in examine()} >= {"python", "mindspore", "numpy", "oneDNN", "device", "temporary space"}
    assert [f for f in examine() if f.status == PROBLEM and f.name != "temporary space"] == []


@pytest.mark.parametrize(("found", "status"), [("1.26.4", OK), ("2.1.0", PROBLEM), (None, PROBLEM)])
def test_numpy_2_is_a_problem_with_a_cure(monkeypatch: pytest.MonkeyPatch, found: str | None, status: str) -> None:
    installed(monkeypatch, numpy=found)
    assert finding("numpy").status == status
    assert ("numpy<2" in finding("numpy").cure) == (status == PROBLEM)


@pytest.mark.parametrize(
    ("found", "status"), [("2.7.0", OK), ("2.10.0", OK), ("2.7.0rc1", OK), ("2.6.9", PROBLEM), (None, PROBLEM)]
)
def test_mindspore_has_to_be_new_enough(monkeypatch: pytest.MonkeyPatch, found: str | None, status: str) -> None:
    installed(monkeypatch, mindspore=found)
    assert finding("mindspore").status == status
    assert (finding("device").status == NOTE) == (status == PROBLEM), "nothing is imported from a broken installation"


@pytest.mark.parametrize(
    ("flags", "value", "status"),
    [(set(), None, OK), ({"avx512f"}, None, OK), ({"avx512f"}, "AVX2", OK), ({"avx512f"}, "AVX512_CORE", PROBLEM)],
)
def test_slow_convolutions_are_told(
    monkeypatch: pytest.MonkeyPatch, flags: set[str], value: str | None, status: str
) -> None:
    from msqkd import platform

    monkeypatch.setattr(environment, "cpu_flags", lambda: flags)
    monkeypatch.setattr(platform, "cpu_flags", lambda: flags)
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    if value is not None:
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", value)
    assert finding("oneDNN").status == status


def test_optional_packages_are_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, mindcv=None)
    assert finding("mindcv (optional)").status == NOTE
    assert "msqkd[mindcv]" in finding("mindcv (optional)").cure


def test_little_temporary_space_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    usage = shutil.disk_usage("/")
    monkeypatch.setattr(environment.shutil, "disk_usage", lambda folder: usage._replace(free=1 << 20))
    assert finding("temporary space").status == PROBLEM
    assert "TMPDIR" in finding("temporary space").cure


def test_every_finding_is_plain_data() -> None:
    for item in examine():
        data = item.to_dict()
        assert set(data) == {"name", "status", "found", "cure"}
        assert data["status"] in (OK, NOTE, PROBLEM)
        assert data["cure"] or data["status"] == OK


def test_versions_a_result_depends_on() -> None:
    assert set(versions()) == {"msqkd", "mindspore", "numpy", "python", "platform"}
    assert all(versions().values())
