"""Several processes with a scheduler each, of which process 0 alone has requests.

What a step does follows from the requests and from the tokens so far, which are the same in all
processes. So before each step process 0 tells the others which calls it made since the last. What
it decides by texts, where one stops, it tells too: the others look at none.
"""

import dataclasses
import json
import logging
import zlib
from collections.abc import Iterable
from typing import Any

from neo_jax.decode.options import SamplingOptions
from neo_jax.decode.requests import Event, PromptRead, Request
from neo_jax.decode.scheduler import Scheduler
from neo_jax.devices.channel import Channel
from neo_jax.errors import NeoError

_LOG = logging.getLogger(__name__)


class LeadingScheduler(Scheduler):
    """The scheduler of process 0, whose calls `follow` repeats in all others."""

    def __init__(self, channel: Channel, *args: Any, **options: Any):
        """Takes what a scheduler takes, and the way to the others."""
        super().__init__(*args, **options)
        self._channel = channel
        self._calls: list[Any] = []  # since the last step
        self._written = 0  # a checksum of what the last step wrote

    def submit(self, request: Request) -> int:
        """Queues a request, see `Scheduler.submit`."""
        id = super().submit(request)
        fields = {field.name: getattr(request, field.name) for field in dataclasses.fields(request)}
        fields["ids"] = [*map(int, request.ids)]
        fields["options"] = [dataclasses.asdict(options) for options in request.options]
        fields["stop_checks"] = len(request.stop_checks)
        self._calls.append(["submit", fields])
        return id

    def cancel(self, id: int, sample: int | None = None) -> None:
        """Drops what is not finished of a request, or of a sample of it."""
        super().cancel(id, sample)
        self._calls.append(["cancel", id, sample])

    def step(self) -> list[Event | PromptRead]:
        """Does a step in all processes, see `Scheduler.step`."""
        calls, self._calls = self._calls, []
        self._channel.send(json.dumps([self._written, calls]).encode())
        try:
            found = super().step()
        except Exception:
            self._channel.settle()
            raise
        self._written = _checksum(found)
        self._calls += [
            ["cancel", event.request, event.sample]  # its row goes on elsewhere
            for event in found
            if isinstance(event, Event)
            and event.completion
            and event.completion.finish_reason == "stop"
        ]
        return found


def follow(scheduler: Scheduler, channel: Channel) -> None:
    """Does in another process what process 0's scheduler does, until the channel is closed.

    Raises:
      NeoError: a step failed, or wrote other tokens than in process 0.
    """
    written = 0
    try:
        for line in channel.lines():
            expected, calls = json.loads(line)
            if written != expected:
                raise NeoError(
                    "this process wrote other tokens than process 0; give all of them the same "
                    "command, checkpoint and version of neo_jax."
                )
            for name, *args in calls:
                if name == "submit":
                    scheduler.submit(_request(*args))
                else:
                    scheduler.cancel(*args)
            written = _checksum(scheduler.step())
    except NeoError:
        raise
    except Exception as error:
        channel.settle()
        _LOG.exception("a step failed")
        raise NeoError("this process failed, as it says above; start all of them again.") from error


def _request(fields: dict[str, Any]) -> Request:
    """Returns what `submit` got, without anything that looks at texts."""
    options = [SamplingOptions(**each) for each in fields["options"]]
    checks = [_goes_on] * fields["stop_checks"]
    return Request(**{**fields, "options": options, "stop_checks": checks})


def _goes_on(_: list[int]) -> None:
    """Is the stop check of a text of which process 0 says where it stops."""


def _checksum(found: Iterable[Event | PromptRead]) -> int:
    """Returns a number for the tokens that a step wrote."""
    new = [(each.request, each.sample, each.ids) for each in found if isinstance(each, Event)]
    return zlib.crc32(repr(new).encode())
