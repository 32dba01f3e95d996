from __future__ import annotations

import builtins
from typing import Any

import pytest

from msqkd import platform
from msqkd.errors import MissingDependencyError


@pytest.fixture(autouse=True)
def _fresh_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "")
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA")


def test_avx2_is_chosen_where_the_cpu_has_avx512(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "cpu_flags", lambda: {"avx2", "avx512f"})
    platform.avoid_slow_convolutions()
    assert platform.os.environ["ONEDNN_MAX_CPU_ISA"] == "AVX2"


def test_the_users_choice_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "cpu_flags", lambda: {"avx512f"})
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX512_CORE")
    platform.avoid_slow_convolutions()
    assert platform.os.environ["ONEDNN_MAX_CPU_ISA"] == "AVX512_CORE"


def test_other_cpus_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "cpu_flags", lambda: {"avx2", "neon"})
    platform.avoid_slow_convolutions()
    assert "ONEDNN_MAX_CPU_ISA" not in platform.os.environ


def test_a_machine_without_cpuinfo_has_no_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: Any, **__: Any) -> Any:
        raise FileNotFoundError("/proc/cpuinfo")

    monkeypatch.setattr(builtins, "open", missing)
    assert platform.cpu_flags() == set()


def test_mindspore_is_imported() -> None:
    assert platform.mindspore().__name__ == "mindspore"


def test_numpy_2_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "version", lambda package: "2.1.3")
    with pytest.raises(MissingDependencyError, match=r"numpy 2\.1\.3 is installed, .* pip install 'numpy<2'"):
        platform.mindspore()


def test_a_missing_mindspore_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "mindspore", None)
    with pytest.raises(MissingDependencyError, match=r"MindSpore cannot be imported .*pip install mindspore"):
        platform.mindspore()
