"""The command ends well, whatever it is doing when it is told to."""

import re
import signal

import httpx
import pytest

from tests.server.running import command

TEXT = "/v1/completions"
LINE = re.compile(r"\d\d:\d\d:\d\d .*")
SIGNALS = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda one: one.name)


def ended(process, number):
    """Its exit code and what it said beside its log."""
    process.send_signal(number)
    code = process.wait(30)
    return code, [line for line in process.stderr.read().splitlines() if not LINE.fullmatch(line)]


@SIGNALS
def test_a_signal_ends_answers_and_the_server_well(number):
    with command() as (process, url):
        asked = {"prompt": "1 2 3 4", "max_tokens": 4000, "stream": True, "temperature": 0, "logit_bias": None}
        with httpx.stream("POST", url + TEXT, json=asked, timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            process.send_signal(number)
            rest = [line for line in lines if line.startswith("data: ")]
        assert process.wait(20) == 0
        assert "shutting down" in rest[-1] or rest[-1] == "data: [DONE]"
        log = process.stderr.read()
        assert "Traceback" not in log


@SIGNALS
@pytest.mark.parametrize("answers", [0, 1, 2], ids=["that just listens", "that still writes", "that has answered"])
def test_a_server_with_a_folder_ends_with_no_code_and_no_word(tmp_path, number, answers):
    asked = {"prompt": " ".join(str(number) for number in range(150)), "max_tokens": 2, "temperature": 1}
    for _ in range(2):
        with command("--cache-dir", str(tmp_path)) as (process, url):
            for _ in range(answers):
                assert httpx.post(url + TEXT, json=asked, timeout=100).status_code == 200
            assert ended(process, number) == (0, [])


def test_what_was_read_is_there_after_a_restart_where_a_folder_keeps_it(tmp_path):
    asked = {"prompt": " ".join(str(number) for number in range(150)), "max_tokens": 2, "temperature": 0}
    cached = []
    for _ in range(2):
        with command("--cache-dir", str(tmp_path)) as (process, url):
            usage = httpx.post(url + TEXT, json=asked, timeout=100).json()["usage"]
            cached.append(usage["prompt_tokens_details"]["cached_tokens"])
            assert ended(process, signal.SIGTERM) == (0, [])
    assert cached[0] == 0
    assert cached[1] > 200
