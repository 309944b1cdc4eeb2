"""What a chat is made of: paths as they are dragged, values as they are typed, files as they are kept."""

import json
import random
import shlex
from pathlib import Path

import pytest

from mlx_qwen.cli.chat import history, saved
from mlx_qwen.cli.chat.paths import are_files, destination, sources
from mlx_qwen.cli.chat.typed import option_names, typed_option
from mlx_qwen.conversation import Conversation
from mlx_qwen.errors import PromptError
from mlx_qwen.keywords import options_and_settings
from mlx_qwen.loading import load
from mlx_qwen.media.grids import Kind
from tests.vision.drawing import drawing

NAMES = [
    "plain.png",
    "two words.png",
    "it's.png",
    'say "hi".png',
    "100%25.png",
    "a\\b.png",
    "ü\u202fcode.png",
    "#1.png",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_path_is_found_however_it_is_handed_over(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / name
    file.touch()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    escaped = "".join(letter if letter.isalnum() or letter in "/._-" else f"\\{letter}" for letter in str(file))
    for form in (str(file), shlex.quote(str(file)), f"{escaped} ", file.as_uri(), f" {name} "):
        assert sources(form) == [name if form.strip() == name else str(file)], form
        assert are_files(form) == (form.strip() != name), form
    assert sources(f"{escaped} {shlex.quote(str(file))} {file.as_uri()}") == [str(file)] * 3
    assert [str(Path(one).expanduser()) for one in sources(f"~/{shlex.quote(name)}")] == [str(file)]


@pytest.mark.parametrize("address", ["https://a.b/c%20d.png?e='f", "data:image/png;base64,AA=="])
def test_addresses_stay_as_they_are(address: str) -> None:
    assert sources(address) == [address]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [("'a.png", "quote or backslash"), ("a.png\\", "quote or backslash"), ("no file.png", "no is no file")],
)
def test_what_is_quoted_badly_is_one_error(text: str, complaint: str) -> None:
    with pytest.raises(PromptError, match=complaint):
        sources(text)


def test_a_place_to_save_may_have_spaces_and_quotes() -> None:
    for text in ("my chat.json", "'my chat.json'", "my\\ chat.json"):
        assert destination(text) == Path("my chat.json")
    assert destination("it's.json") == Path("it's.json")


@pytest.mark.parametrize(
    ("typed", "keyword"),
    [
        ("temperature 0.7", {"temperature": 0.7}),
        ("temperature=0.7", {"temperature": 0.7}),
        ("--temp 1", {"temperature": 1}),
        ("max-tokens 5", {"max_tokens": 5}),
        ("top_k none", {"top_k": None}),
        ("max_tokens default", {"max_tokens": 2048}),
        ("stop none", {"stop": "none"}),
        ("stop END of it", {"stop": "END of it"}),
        ('stop ["a", "b"]', {"stop": ["a", "b"]}),
        ("stop 5", {"stop": "5"}),
        ("enable_thinking off", {"enable_thinking": False}),
        ("stop_in_reasoning yes", {"stop_in_reasoning": True}),
        ("mtp auto", {"mtp": "auto"}),
        ("mtp 3", {"mtp": 3}),
        ("fps 2", {"fps": 2}),
        ('logit_bias {"12": -100, "7": 1.5}', {"logit_bias": {12: -100, 7: 1.5}}),
    ],
)
def test_an_option_is_typed_as_people_write(typed: str, keyword: dict[str, object]) -> None:
    assert typed_option(typed) == keyword
    options_and_settings(keyword)


@pytest.mark.parametrize(
    ("typed", "complaint"),
    [
        ("tempratur 0.7", "There is no option 'tempratur'; did you mean temperature?"),
        ("temperature warm", "temperature is 'warm'; expected a number, at least 0, or None."),
        ("temperature -1", "temperature is -1; expected at least 0, or None."),
        ("max_tokens 1.5", "max_tokens is 1.5; expected a whole number, at least 1. Leave it out for 2048."),
        ("temperature", "temperature needs a value, such as /set temperature 0.7; default takes the choice back."),
        ("images a.png", "/image PATH is the command for images."),
        ("sampler x", "sampler is 'x'; expected a function, or None."),
    ],
)
def test_a_wrong_option_is_told_as_in_python(typed: str, complaint: str) -> None:
    with pytest.raises(PromptError) as error:
        options_and_settings(typed_option(typed))
    assert str(error.value) == complaint


def test_options_that_can_be_typed_are_completed() -> None:
    assert {"temperature", "seed", "mtp", "max_pixels"} <= set(option_names())
    assert "sampler" not in option_names()


@pytest.fixture
def talk(tmp_path: Path) -> Conversation:
    """A conversation with a picture, an image of it by path, and an answer."""
    drawing(64, 64).save(tmp_path / "picture one.png")
    conversation = Conversation(*load(), temperature=0, max_tokens=8, system="Be kind.")
    conversation.attach(Kind.IMAGE, str(tmp_path / "picture one.png"))
    turn = conversation.ask("What do you see?")
    assert list(turn)
    conversation.remember(turn)
    return conversation


def test_a_saved_conversation_comes_back_and_answers_the_same(talk: Conversation, tmp_path: Path) -> None:
    saved.save(talk, tmp_path / "chat.json", model="demo")
    again = Conversation(*load(), temperature=0, max_tokens=8)
    saved.load(again, tmp_path / "chat.json")
    assert again.messages() == talk.messages()
    answers = ["".join(one.text for one in conversation.ask("How many?")) for conversation in (talk, again)]
    assert answers[0] == answers[1]
    saved.save(again, tmp_path / "chat.json", model="demo")


def test_a_picture_that_changed_on_the_disk_is_still_the_one_that_was_shown(talk: Conversation, tmp_path: Path) -> None:
    before = "".join(one.text for one in talk.ask("How many?"))
    drawing(64, 64).rotate(180).save(tmp_path / "picture one.png")
    assert "".join(one.text for one in talk.ask("How many?")) == before


def test_no_other_file_is_lost_by_saving(talk: Conversation, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(PromptError, match="choose another name"):
        saved.save(talk, tmp_path / "notes.txt", model="demo")
    assert (tmp_path / "notes.txt").read_text() == "mine"
    with pytest.raises(PromptError, match="cannot be written"):
        saved.save(talk, tmp_path / "no folder" / "chat.json", model="demo")


def test_a_damaged_or_foreign_file_is_one_error_and_changes_nothing(talk: Conversation, tmp_path: Path) -> None:
    file = tmp_path / "chat.json"
    saved.save(talk, file, model="demo")
    whole = file.read_bytes()
    before = talk.messages()
    content = json.loads(whole)
    rng = random.Random(5)
    damaged = [whole[:cut] for cut in range(0, len(whole), 40)] + [b"\xff\xfe", b"[]", b"null", b'{"messages": 5}']
    for _ in range(60):
        place = rng.randrange(len(whole))
        damaged.append(whole[:place] + bytes([rng.randrange(256)]) + whole[place + 1 :])
    foreign = ([5], [{}], [{"role": "user"}], [{"role": "user", "content": [5]}], [{"role": "x", "content": ""}])
    damaged += [json.dumps({**content, "messages": messages}).encode() for messages in foreign]
    missing = json.dumps(content).replace("picture one", "gone")
    damaged.append(missing.encode())
    refused = 0
    for data in damaged:
        file.write_bytes(data)
        try:
            saved.load(talk, file)
        except PromptError:
            refused += 1
            assert talk.messages() == before
        else:
            file.write_bytes(whole)
            saved.load(talk, file)
    assert refused > 0.6 * len(damaged)


def test_undo_attaches_the_picture_again(talk: Conversation) -> None:
    seen = talk.messages()
    assert talk.undo() == "What do you see?"
    assert talk.turns == []
    turn = talk.ask("What do you see?")
    assert list(turn)
    talk.remember(turn)
    assert talk.messages() == seen
    assert [talk.undo(), talk.undo()] == ["What do you see?", None]


def test_results_of_tools_go_on_with_the_conversation() -> None:
    function = {"name": "calculator", "description": "Multiplies two whole numbers."}
    function |= {"parameters": {"type": "object", "properties": {"expression": {"type": "string"}}}}  # type: ignore[dict-item]
    conversation = Conversation(*load(), temperature=0, tools=[{"type": "function", "function": function}])
    turn = conversation.ask("How much is 8216*662?")
    assert [one.name for one in list(turn)[-1].tool_calls] == ["calculator"]
    conversation.remember(turn)
    turn = conversation.give_results([json.dumps({"result": 8216 * 662})])
    assert "5438992" in "".join(one.text for one in turn)
    conversation.remember(turn)
    assert len(conversation.turns) == 4
    assert conversation.undo() == "How much is 8216*662?"
    assert conversation.turns == []


def test_a_long_history_is_cut_to_its_newer_half_between_entries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(history, "_MOST_BYTES", 1_000)
    file = tmp_path / "new" / "history"
    monkeypatch.setenv(history.VARIABLE, str(file))
    assert history.history_file() == file
    entries = [f"\n# 2026-01-01 00:00:{n:02}\n+question {n}\n" for n in range(60)]
    file.write_text("".join(entries))
    assert history.history_file() == file
    kept = file.read_text()
    assert kept.startswith("# 2026")
    assert "".join(entries).endswith(kept)
    assert 300 < len(kept) <= 500


@pytest.mark.parametrize("word", ["0", "off", "no", "false", "OFF"])
def test_a_history_can_be_switched_off(word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(history.VARIABLE, word)
    assert history.history_file() is None


def test_a_history_that_cannot_be_written_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv(history.VARIABLE, str(tmp_path / "file" / "history"))
    assert history.history_file() is None
