from __future__ import annotations

import pytest

from qvm.guest.protocol import (
    CREDIT,
    DATA,
    MAX_FRAME,
    MAX_LINE,
    MAX_MESSAGE,
    OPEN,
    FrameParser,
    LineParser,
    SeedState,
    encode_frame,
    encode_message,
)


def test_messages_survive_any_cut() -> None:
    lines = b"".join(encode_message({"id": n, "text": "é\n"}) for n in range(3))
    for cut in range(len(lines)):
        parser = LineParser()
        assert [message["id"] for part in (lines[:cut], lines[cut:]) for message in parser.feed(part)] == [0, 1, 2]


def test_what_is_no_message_is_dropped() -> None:
    parser = LineParser()
    assert list(parser.feed(b'\n\xff\xfe\n[1]\n"x"\n{"half\n{"id":1}\n')) == [{"id": 1}]
    assert list(parser.feed(b"x" * (MAX_LINE + 1))) == []
    assert list(parser.feed(b'\n{"id":2}\n')) == [{"id": 2}]


def test_a_message_has_a_limit() -> None:
    with pytest.raises(ValueError, match="too long"):
        encode_message({"data": "x" * MAX_MESSAGE})


def test_frames_begin_behind_the_marker_and_survive_any_cut() -> None:
    marker = bytes(range(16))
    raw = b"old frames " + marker[:9] + marker + encode_frame(1, OPEN, b"x") + encode_frame(7, DATA, b"") \
        + encode_frame(7, CREDIT, b"1234")
    for cut in range(len(raw)):
        parser = FrameParser(marker)
        frames = [frame for part in (raw[:cut], raw[cut:]) for frame in parser.feed(part)]
        assert frames == [(1, OPEN, b"x"), (7, DATA, b""), (7, CREDIT, b"1234")]
        assert parser.begun


@pytest.mark.parametrize("bad", [
    encode_frame(1, 0), encode_frame(1, 8), b"\0\0\0\1\4" + (MAX_FRAME + 1).to_bytes(4, "big"),
])
def test_bytes_that_are_no_frames_are_refused(bad: bytes) -> None:
    parser = FrameParser(b"m" * 16)
    with pytest.raises(ValueError, match="no frame"):
        list(parser.feed(b"m" * 16 + bad))


def test_seed_state() -> None:
    state = SeedState.from_message({"state": "failed", "errors": [{"step": "dns", "message": "no"}], "seconds": 1})
    assert state.done and state.errors == ("dns: no",) and state.seconds == 1.0
    assert not SeedState.from_message({"state": "pending"}).done
