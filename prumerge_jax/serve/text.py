"""Tokens of an answer to text, piece by piece; a stop string ends it and is not part of it."""

from collections.abc import Iterable, Sequence

from prumerge_jax.data.tokenizer import TextStream, Tokenizer


class StoppingText:
    """The text of one answer as its tokens come.

    Text that could be the beginning of a stop string is held back until more says whether it is.

    Attributes:
      stopped: a stop string was generated; nothing follows.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()) -> None:
        self._stream, self._stops = TextStream(tokenizer), tuple(stops)
        self._held = ""
        self.stopped = False

    def push(self, token_ids: Iterable[int]) -> str:
        """The text that these tokens add, perhaps none."""
        return "" if self.stopped else self._add(self._stream.push(token_ids))

    def finish(self) -> str:
        """What was held back, where no stop string came."""
        if self.stopped:
            return ""
        piece = self._add(self._stream.finish()) + ("" if self.stopped else self._held)
        self._held = ""
        return piece

    def _add(self, text: str) -> str:
        self._held += text
        found = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        self.stopped = bool(found)
        end = min(found) if found else len(self._held) - self._beginning()
        piece, self._held = self._held[:end], self._held[end:]
        return piece

    def _beginning(self) -> int:
        """Length of the longest end of the text that begins a stop string."""
        longest = max(map(len, self._stops), default=0)
        for length in range(min(longest - 1, len(self._held)), 0, -1):
            end = self._held[-length:]
            if any(stop.startswith(end) for stop in self._stops):
                return length
        return 0
