"""The command line and the processes behind it: real processes, a real data folder, nothing pretended."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from clouds import Cloud
from skysail import __version__, doctor
from skysail.cli import show
from skysail.cli.main import main
from skysail.kit.config import Config
from skysail.kit.errors import SkysailError
from skysail.kit.process import started_at
from skysail.serve import endpoint, processes, programs, up

SLEEPER = [sys.executable, "-c", "import time; time.sleep(60)"]
STUBBORN = [sys.executable, "-c", "import signal, time; signal.signal(15, signal.SIG_IGN); print('deaf', flush=True); "
                                  "time.sleep(60)"]


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    monkeypatch.setenv("SKYSAIL_DATA", str(tmp_path))
    return Config(data=str(tmp_path), port=1)


def test_a_process_is_found_again_and_stopped(config: Config) -> None:
    record = processes.start(config, "agent", SLEEPER, env=os.environ, digest="d")
    assert processes.find(config, "agent") == record
    assert processes.stop(config, "agent")
    assert started_at(record.pid) is None
    assert processes.find(config, "agent") is None
    assert not processes.stop(config, "agent")


def test_a_process_deaf_to_sigterm_is_killed(config: Config) -> None:
    record = processes.start(config, "agent", STUBBORN, env=os.environ)
    log = processes.log_path(config, "agent")
    assert processes.wait_until(lambda: log.read_text() == "deaf\n", 20)
    assert processes.stop(config, "agent", grace_seconds=0.3)
    assert started_at(record.pid) is None


def test_a_reused_pid_is_never_signalled(config: Config) -> None:
    with subprocess.Popen(SLEEPER) as stranger:
        path = processes.record_path(config, "agent")
        path.parent.mkdir(parents=True)
        path.write_bytes(msgspec.json.encode(processes.Record(pid=stranger.pid, started=1)))
        assert processes.find(config, "agent") is None
        assert not processes.stop(config, "agent")
        processes.end(processes.Record(pid=stranger.pid, started=1), 1)
        assert stranger.poll() is None
        stranger.send_signal(signal.SIGKILL)


def test_status_of_a_cloud_that_does_not_run(config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    Path(config.data, "skysail.toml").write_text("port = 1\n")
    assert main(["status", "--json"]) == 1
    answer = json.loads(capsys.readouterr().out)
    assert answer["running"] is False
    assert answer["endpoint"] == "http://127.0.0.1:1"


def test_env_prints_exports_that_a_shell_understands(config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    Path(config.data, "credentials.json").write_text('{"access_key_id": "AKIAX", "secret_access_key": "a/b+c\'d"}')
    assert main(["env"]) == 0
    shell = subprocess.run(["sh", "-c", capsys.readouterr().out + 'printf %s "$AWS_SECRET_ACCESS_KEY"'],
                           capture_output=True, check=True, text=True)
    assert shell.stdout == "a/b+c'd"


def test_what_somebody_named_is_shown_as_it_is(config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    # ":100:" is an emoji to rich, and "[red]" a style; both are names and addresses here.
    told = "fd53:6b79:7361:100:0:0:0:a [red]one"
    show.table([{"address": told}], ["address"])
    show.pairs({"address": told})
    show.line(told)
    show.step(told)
    show.failure(SkysailError(told, told))
    out, err = capsys.readouterr()
    assert (out.count(told), err.count(told)) == (3, 3)


def test_what_fails_is_said_with_its_cure_and_without_a_traceback(
        config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env"]) == 1
    said = capsys.readouterr().err
    assert "credentials.json" in said
    assert "cure: run: sudo ./skysail up" in said
    assert "Traceback" not in said


def test_every_verb_tells_the_version_of_skysail(capsys: pytest.CaptureFixture[str]) -> None:
    for verb in ([], ["launch"], ["host"], ["host", "list"]):
        main([*verb, "--version"])
        assert capsys.readouterr().out == f"{__version__}\n"


def test_an_unknown_verb_is_refused(config: Config) -> None:
    assert main(["fly"]) == 2


def test_broken_credentials_are_named(config: Config) -> None:
    Path(config.data, "credentials.json").write_text("{}")
    with pytest.raises(SkysailError, match="holds no access key"):
        endpoint.credentials(config)


def test_the_program_is_copied_whole_and_only_when_it_changed(config: Config) -> None:
    digest = up.install_program(config)
    copy = config.root / "program"
    assert (copy / "skysail" / "serve" / "up.py").exists()
    before = copy.stat().st_ino
    assert up.install_program(config) == digest
    assert copy.stat().st_ino == before
    assert up.install_program(Config(data=config.data, port=2)) != digest


def test_the_controller_runs_without_privileges_in_both_ways_to_start_it(config: Config) -> None:
    assert "--no-new-privs" in programs.command(config, "controller")
    assert "--bounding-set=-all" in programs.command(config, "controller")
    assert "User=skysail" in programs.unit(config, "controller") and "LimitNOFILE" in programs.unit(config, "controller")
    assert "KillMode=process" in programs.unit(config, "agent")


def test_the_doctor_names_where_it_looked_and_a_cure_for_all_that_is_not_good(config: Config) -> None:
    looks = [doctor.disk, doctor.memory, doctor.cgroups, doctor.clock]
    for finding in (look(config) for look in looks):
        assert finding.saw and finding.where
        assert finding.verdict == "good" or finding.cure


@pytest.mark.real
def test_the_doctor_sees_a_name_servers_address_that_another_has(config: Config) -> None:
    with socket.socket(type=socket.SOCK_DGRAM) as other:
        other.bind(("127.0.0.1", 0))
        port = other.getsockname()[1]
        found = doctor.name_server(Config(data=config.data, dns_port=port, dns_api_port=1))
        assert found.verdict == "bad" and str(port) in found.where and "dns_port" in found.cure
    assert doctor.name_server(Config(data=config.data, dns_port=port, dns_api_port=1)).verdict == "good"
    assert doctor.name_server(Config(data=config.data, dns_port=53, dns_listen="192.0.2.1", dns_api_port=1)).verdict == "bad"


def test_the_name_server_has_one_capability_at_most_in_both_ways_to_start_it(config: Config) -> None:
    low = Config(data=config.data, dns_port=53)
    assert "--bounding-set=-all" in programs.command(config, "dns")
    assert "--bounding-set=-all,+net_bind_service" in programs.command(low, "dns")
    assert "CapabilityBoundingSet=\n" in programs.unit(config, "dns") and "User=skysail-dns" in programs.unit(config, "dns")
    assert "AmbientCapabilities=CAP_NET_BIND_SERVICE\n" in programs.unit(low, "dns")
    assert "dns" not in programs.names(Config(data=config.data, engines="sim"))


@pytest.mark.real
def test_the_doctor_sees_namespaces_and_network(config: Config) -> None:
    assert doctor.namespaces(config).verdict == "good"
    assert doctor.network(config).verdict == "good"


def test_a_second_agent_on_the_same_data_is_refused(cloud: Cloud) -> None:
    second = subprocess.run([sys.executable, "-m", "skysail.serve.agent"], capture_output=True, text=True, timeout=60,
                            env={**os.environ, "SKYSAIL_DATA": str(cloud.folder)}, check=False)
    assert second.returncode != 0 and "another agent works in" in second.stderr
    assert programs.healthy(cloud.config, "agent")
