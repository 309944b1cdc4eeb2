"""A rank above 0: loads its share, then does what rank 0 says until that ends. It says nothing itself but errors."""

import socket
import time
from queue import SimpleQueue
from threading import Event, Thread
from typing import NoReturn

import mlx.core as mx

from mlx_qwen.distributed.ending import end, sentence
from mlx_qwen.distributed.frames import Frame
from mlx_qwen.distributed.link import Link
from mlx_qwen.distributed.pace import Record
from mlx_qwen.distributed.wire import asked_of, turn_of
from mlx_qwen.engine.engine import Engine
from mlx_qwen.engine.prefix_files import flush_all
from mlx_qwen.engine.sequence import Sequence
from mlx_qwen.errors import MLXQwenError
from mlx_qwen.model import Model
from mlx_qwen.prompt import Processor
from mlx_qwen.requests import own, prepare_request

# Seconds for a failure to be told before this process ends with it.
_LAST_WORDS = 2.0
# Seconds for what is being computed when all end well: a reduction may never come back then.
_COMPUTING = 3.0
# Seconds for rank 0 to end all, once it knows that a neighbour is silent.
_HEARING = 5.0
# What a rank tells itself: that its folder has taken a piece, and may take another.
_WRITE = Frame("write", {})


class Follower:
    """A rank that does what rank 0 says, on this connection."""

    def __init__(self, connection: socket.socket) -> None:
        self._inbox: SimpleQueue[Frame] = SimpleQueue()
        self._finishing = Event()
        self._link = Link(connection, "rank 0", self._heard, lambda reason: end(sentence(reason)))

    def _heard(self, frame: Frame) -> None:
        """Take a frame, in the link's thread: after a failure the end is now, whatever is being computed."""
        if frame.kind == "end" and frame.values["reason"]:
            end(frame.values["reason"], quiet=frame.values["quiet"])
        self._inbox.put(frame)
        if frame.kind == "end":
            if not self._finishing.wait(_COMPUTING):
                end()
            while True:  # the other thread ends this process
                time.sleep(1)

    def say(self, kind: str, **values: object) -> None:
        """Send a frame to rank 0."""
        self._link.send(Frame(kind, values))

    def expect(self, kind: str) -> Frame:
        """The next frame, of this kind."""
        frame = self._next()
        if frame.kind != kind:
            raise MLXQwenError(f"Rank 0 sent {frame.kind!r}, expected {kind!r}.")
        return frame

    def _next(self) -> Frame:
        """The next frame; the one that ends all well ends this process, once what was read is on the disk."""
        frame = self._inbox.get()
        if frame.kind == "end":
            self._finishing.set()
            flush_all()
            end()
        return frame

    def fail(self, reason: str) -> NoReturn:
        """Tell rank 0 why this one cannot go on, and end with that."""
        self.say("failed", reason=reason)
        self._link.close(_LAST_WORDS)
        end(reason)

    def lost(self, other: int) -> None:
        """Tell rank 0, which ends all, that nothing comes from a neighbour any more; called in a thread of its link."""
        self.say("lost", rank=other)
        time.sleep(_HEARING)
        if self._finishing.is_set():
            return
        end(sentence(f"nothing comes from rank {other} any more, and nothing from rank 0"))

    def follow(self, engine: Engine, processor: Processor) -> NoReturn:
        """Take every turn of rank 0's engine."""
        requests: SimpleQueue[Frame] = SimpleQueue()
        prepared: dict[int, Sequence] = {}
        Thread(target=self._prepare, args=(engine.model, processor, requests, prepared), daemon=True).start()
        engine.be_led(lambda: self._inbox.put(_WRITE))
        record = Record()
        while True:
            frame = self._next()
            if frame.kind == "request":
                requests.put(frame)
            elif frame.kind == "forget":
                prepared.pop(frame.values["number"], None)
            elif frame is _WRITE:
                if engine.write_on():
                    engine.go_on()
            else:
                outgoing = engine.follow(turn_of(frame, prepared))
                step = record.step(outgoing, engine.model.mtp_reads)
                self.say("took", **step._asdict())

    def _prepare(
        self, model: Model, processor: Processor, requests: "SimpleQueue[Frame]", prepared: dict[int, Sequence]
    ) -> None:
        """Make the same sequences as rank 0 of what it asks for, while turns are being taken."""
        while True:
            frame = requests.get()
            number = frame.values["number"]
            try:
                prepared[number] = _sequence(model, processor, frame)
            except Exception as error:
                self.say("ready", number=number, reason=str(error) or type(error).__name__)
            else:
                self.say("ready", number=number)


def _sequence(model: Model, processor: Processor, frame: Frame) -> Sequence:
    asked = asked_of(frame)
    request = prepare_request(model, processor, asked.inputs, asked.options, asked.settings, index=asked.index)
    sequence = request.sequence
    sequence.number, sequence.sampler.seed = frame.values["number"], frame.values["seed"]
    own(model, sequence)
    mx.synchronize()
    return sequence
