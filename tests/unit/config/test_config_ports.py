"""Forward rules: how they are written, what is refused, and where a problem is said to be."""

from __future__ import annotations

from pathlib import Path

import pytest

from qvm.config.context import Context, RejectedError
from qvm.config.ports import Forwards, PortForward, Ports, SocketPath, find_earlier, parse_rule, validate_rules
from qvm.config.resolve import resolve_config
from qvm.errors import ConfigError

CONTEXT = Context("dev", Path("/work/here"), {"HOME": "/home/me"})


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("8080:80", PortForward(Ports(80, 80), Ports(8080, 8080))),
        ("8080", PortForward(Ports(8080, 8080), Ports(8080, 8080))),
        ("5353/udp", PortForward(Ports(5353, 5353), Ports(5353, 5353), "udp")),
        ("8080:80/any", PortForward(Ports(80, 80), Ports(8080, 8080), "any")),
        ("8000-8010:9000-9010", PortForward(Ports(9000, 9010), Ports(8000, 8010))),
        ("0.0.0.0:8080:80", PortForward(Ports(80, 80), Ports(8080, 8080, "0.0.0.0"))),
        ("*:8080:80", PortForward(Ports(80, 80), Ports(8080, 8080, "0.0.0.0"))),
        ("localhost:8080:80", PortForward(Ports(80, 80), Ports(8080, 8080, "127.0.0.1"))),
        ("[::1]:8080:127.0.0.1:80", PortForward(Ports(80, 80, "127.0.0.1"), Ports(8080, 8080, "::1"))),
        ("8080:[::1]:80", PortForward(Ports(80, 80, "::1"), Ports(8080, 8080))),
        ("~/db.sock:5432", PortForward(Ports(5432, 5432), SocketPath("/home/me/db.sock"))),
        ("./x.sock:80", PortForward(Ports(80, 80), SocketPath("/work/here/x.sock"))),
        ("2375:/run/docker.sock", PortForward(SocketPath("/run/docker.sock"), Ports(2375, 2375))),
        ("/tmp/a.sock:/run/b.sock", PortForward(SocketPath("/run/b.sock"), SocketPath("/tmp/a.sock"))),
        ("2375:/run/tcp", PortForward(SocketPath("/run/tcp"), Ports(2375, 2375))),
        ("reverse:5000:6000", PortForward(Ports(6000, 6000), Ports(5000, 5000), reverse=True)),
        ("reverse:/tmp/a.sock:/run/b.sock",
         PortForward(SocketPath("/run/b.sock"), SocketPath("/tmp/a.sock"), reverse=True)),
        ("ignore:3000-3010", PortForward(Ports(3000, 3010), None, "any")),
        ("ignore:127.0.0.1:53/udp", PortForward(Ports(53, 53, "127.0.0.1"), None, "udp")),
    ],
)  # fmt: skip
def test_a_rule_is_read_and_written(text: str, rule: PortForward) -> None:
    assert parse_rule(text, CONTEXT) == rule
    assert parse_rule(str(rule)) == rule, "what is written can be read without a context"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "not HOST:GUEST"),
        ("80:90:100", "not HOST:GUEST"),
        ("http:80", "'http:80' is neither a port"),
        ("8080:0", "out of range"),
        ("8080:65536", "out of range"),
        ("8010-8000:1-2", "ends before it begins"),
        ("8000-8010:9000", "differ in length"),
        ("::1:8080:80", "IPv6 addresses stand in brackets"),
        ("[::zz]:8080:80", "is not an IP address"),
        ("999.1.1.1:8080:80", "is not an IP address"),
        ("127.0.0.1:/run/x", "a port must follow the address 127.0.0.1"),
        ("127.0.0.1", "a port must follow"),
        ("8080:run/x.sock", "neither a port"),
        ("8080:/run/../x.sock", "absolute"),
        ("8080:/run/x.sock/udp", "neither"),
        ("~/x.sock:80/udp", "has no /udp"),
        ("~/x.sock:80-90", "does not fit into one socket"),
        ("80-90:/run/x.sock", "does not lead to one socket"),
        ("reverse:80:80/udp", "only TCP"),
        ("reverse:80", "not HOST:GUEST"),
        ("ignore:80:90", "is not ignore:"),
        ("2222:22", "--ssh-port"),
        (f"/{'x' * 120}:80", "too long"),
    ],
)
def test_what_cannot_be_a_rule_says_why(text: str, words: str) -> None:
    if text == "8080:/run/x.sock/udp":  # a path may end like that
        assert parse_rule(text, CONTEXT).guest == SocketPath("/run/x.sock/udp")
        return
    with pytest.raises(RejectedError, match="(?i)" + words.replace("[", r"\[").replace("-", r"\-")):
        parse_rule(text, CONTEXT)


def test_rules_that_want_the_same_end_are_refused() -> None:
    def problems(*texts: str) -> int:
        return len(validate_rules([parse_rule(text, CONTEXT) for text in texts], CONTEXT))

    assert problems("8080:80", "127.0.0.1:8080:81") == 1
    assert problems("8000-8010:80-90", "8005:100") == 1
    assert problems("8080:80", "8080:80/udp") == 0
    assert problems("8080:80/any", "8080:81/udp") == 1
    assert problems("8080:80", "[::1]:8080:81") == 0
    assert problems("/tmp/a.sock:80", "/tmp/a.sock:81") == 1
    assert problems("reverse:80:8080", "reverse:81:8080") == 1
    assert problems("8080:80", "ignore:80") == 0
    assert problems("/nowhere/a.sock:80") == 1


def test_a_rule_behind_one_that_takes_all_it_could() -> None:
    texts = ("ignore:90-99", "8080:80", "8081:80", "8082:127.0.0.1:80", "8095:95/udp", "96:96")
    rules = [parse_rule(text) for text in texts]
    assert [str(find_earlier(rules, rule)) for rule in rules] == [
        "None", "None", "8080:80", "8080:80", "ignore:90-99", "ignore:90-99"]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QVM_HOME", str(tmp_path))
    (tmp_path / "dev").mkdir()
    return tmp_path


def test_the_profile_file_takes_text_numbers_and_mappings(home: Path) -> None:
    (home / "dev" / "qvm.yaml").write_text(
        "portForwards:\n  - 8080:80\n  - 9000\n  - {host: 7000, guest: '127.0.0.1:70', protocol: any}\n"
        "  - host: 5000\n    guest: /run/x.sock\n    reverse: true\n  - {guest: 3000-3010, ignore: yes}\n"
        "portForwarder: user\n"
    )
    config = resolve_config("dev", {}, cwd=Path("/"), environ={"HOME": "/root"}).config
    assert [str(rule) for rule in config.port_forwards] == [
        "8080:80", "9000:9000", "7000:127.0.0.1:70/any", "reverse:5000:/run/x.sock", "ignore:3000-3010"]
    assert config.port_forwarder == "user"
    assert Forwards().parse(Forwards().dump(config.port_forwards), CONTEXT) == config.port_forwards


def test_problems_are_told_all_at_once_with_line_and_column(home: Path) -> None:
    file = home / "dev" / "qvm.yaml"
    file.write_text(
        "portForwards:\n  - 8080:80\n  - 80:http\n  - host: 70\n    gest: 7\n    protocol: sctp\n  - 8080:81\n"
        "portForwarder: iptables\n"
    )
    with pytest.raises(ConfigError) as caught:
        resolve_config("dev", {}, cwd=Path("/"), environ={"HOME": "/root"})
    told = str(caught.value) + str(caught.value.details)
    for line in (f"{file}:3:5: portForwards: '80:http'", f"{file}:5:11: portForwards: unknown key 'gest'",
                 f"{file}:6:15: portForwards: 'sctp'", "a rule needs its guest",
                 f"{file}:8:16: portForwarder: 'iptables' is not one of auto, user, ssh, none"):
        assert line in told, told


def test_two_rules_for_one_port_are_told_where_the_second_stands(home: Path) -> None:
    file = home / "dev" / "qvm.yaml"
    file.write_text("portForwards:\n  - 8080:80\n  - 8080:81\n")
    with pytest.raises(ConfigError, match=r"qvm\.yaml:3:5: portForwards: 8080:81 and 8080:80 want the same end"):
        resolve_config("dev", {}, cwd=Path("/"), environ={"HOME": "/root"})
