"""The images room: sources derived from apt's configuration, and the library."""

from __future__ import annotations

from pathlib import Path

from skysail.images.sources import derive


def test_sources_follow_the_machine(tmp_path: Path) -> None:
    parts = tmp_path / "sources.list.d"
    parts.mkdir()
    (parts / "a.sources").write_text("Types: deb\n# note\nURIs: http://one.test/debian\nSuites: bookworm\n\n"
                                     "Types: deb\nURIs: http://two.test/sec\nSuites: bookworm-security\n")
    (parts / "b.list").write_text("deb [arch=amd64 signed-by=/k] http://other.test/x nodistro main\n")
    release = tmp_path / "os-release"
    release.write_text("VERSION_CODENAME=bookworm\n")
    made = derive("trixie", tmp_path, release)
    assert made == ["deb http://one.test/debian trixie main", "deb http://one.test/debian trixie-updates main",
                    "deb http://one.test/debian trixie-backports main", "deb http://two.test/sec trixie-security main"]
