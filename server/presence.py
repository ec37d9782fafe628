"""What a device's requests tell of it: whether it is still there, and whether its SuperNode has lost count.

Flower 1.41's SuperNode does one message after the other: it pulls a message, gets its run and its objects, confirms it,
works, and pushes the answer; only then does it pull again. When a run ends between the first and the confirmation, or
a pulled message is lost on the way, the SuperNode gives up on the message but not on its answer, and from then on it
holds every answer back until the next message comes. It never gets over that by itself. The sign is that it pulls while
it owes an answer.
"""

from __future__ import annotations

import time

FLEET = "/v1/fleet/"
ENTER, LEAVE, HEARTBEAT = (FLEET + name for name in ("activate-node", "deactivate-node", "send-node-heartbeat"))
POLL, GET_RUN, GET_FAB = (FLEET + name for name in ("pull-messages", "get-run", "get-fab"))
OBJECT, CONFIRM, ANSWER = (FLEET + name for name in ("pull-object", "confirm-message-received", "push-messages"))

FREE = 3.0  # seconds that a lost connection's place stays free
IDLE, BUSY = 8.0, 32.0  # seconds without a request after which a device that polls (3 s), or works (27 s), is gone


class Presence:
    """One device, as the door sees it.

    Attributes:
        inside: its requests under way.
        free_until: until when its place stays free (`time.monotonic`).
        owes: whether it has pulled a message that it has not answered.
    """

    def __init__(self, since: float) -> None:
        """`since` is when the door was opened: whoever is not heard after that was not there."""
        self._heard, self._polls = since, False
        self.inside, self.free_until, self.owes = 0, 0.0, False

    def heard(self, path: str, status: int, size: int) -> None:
        """Take note of a request: its path, the status and the bytes of its answer."""
        good = 0 < status < 400
        if status == 401:
            return  # it was somebody else, with the device's key but not its signature
        if path in (OBJECT, CONFIRM) or (path == POLL and good and size > 0):
            self.owes = True
        elif path in (ENTER, ANSWER) or (path in (GET_RUN, GET_FAB) and not good):
            self.owes = False
        if good:
            self._heard = time.monotonic()
            self._polls = self._polls if path == HEARTBEAT else path in (ENTER, POLL) and not self.owes

    def is_gone(self) -> bool:
        """Whether it has asked for nothing for so long that the connection it had must be lost."""
        return not self.inside and time.monotonic() - self._heard > (IDLE if self._polls else BUSY)

    def free(self) -> None:
        """Keep its place free for a moment."""
        self.free_until = time.monotonic() + FREE

    def is_kept_free(self) -> bool:
        return time.monotonic() < self.free_until
