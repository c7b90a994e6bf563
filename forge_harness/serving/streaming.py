"""Completions as they are sent: text of tokens, and server-sent events."""

from __future__ import annotations

import asyncio
import codecs
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from .completer import Completed
from .exchange import Reply, dump
from .inputs import Completion
from .jobs import Job
from .problems import Problem

MEDIA_TYPE = "text/event-stream"
_DONE = b"data: [DONE]\n\n"
_BYTES = 256


class TokenText:
    """Text of byte tokens as they come; what is no UTF-8 becomes U+FFFD."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token: int) -> str:
        """Returns the text that is certain with one more token; ids beyond bytes have none."""
        return self._decoder.decode(bytes([token]) if token < _BYTES else b"")

    def end(self) -> str:
        """Returns what was still open."""
        return self._decoder.decode(b"", final=True)


def text_of(tokens: Sequence[int]) -> str:
    """Returns the text of all tokens: what a stream of them adds up to."""
    text = TokenText()
    return "".join(map(text.add, tokens)) + text.end()


def usage(wanted: Completion, completed: Completed) -> dict[str, int]:
    """Returns the tokens of prompt and completion."""
    return {
        "prompt_tokens": len(wanted.prompt),
        "completion_tokens": len(completed.tokens),
    }


class TokenStream:
    """The events of one completion: a token each, then the end, then `[DONE]`.

    Args:
        job: Admitted, not submitted; its tokens come here.
        request_id: Of the request.
        release: Called once, when the stream has ended in whatever way.
    """

    def __init__(self, job: Job, request_id: str, release: Callable[[], None]) -> None:
        self._job, self._request_id, self._release = job, request_id, release
        self._tokens: asyncio.Queue[int | None] = asyncio.Queue()
        self._text = TokenText()
        self._first: int | None = None
        self._is_closed = False
        self.reply: Reply | None = None
        job.on_token = self._tokens.put_nowait
        job.future.add_done_callback(self._end)

    async def begin(self) -> None:
        """Waits for the first token, so that what fails before it has a status of its own.

        Raises:
            Problem: There will be none.
        """
        self._first = await self._tokens.get()
        if self._first is None:
            self._job.future.result()

    async def __aiter__(self) -> AsyncIterator[bytes]:
        token = self._first
        while token is not None:
            yield _event({"text": self._text.add(token), "token": token})
            token = await self._tokens.get()

    def last(self, problem: Problem | None = None) -> bytes:
        """Returns the end of the completion and `[DONE]`, and counts the request by them.

        Args:
            problem: What the stream ends with instead; None: with what the completion came to.
        """
        if problem is None:
            try:
                return self._completed(self._job.future.result()) + _DONE
            except Problem as found:
                problem = found
        return self._failed(problem) + _DONE

    def close(self) -> None:
        """Releases what the stream holds; once."""
        if not self._is_closed:
            self._is_closed = True
            self._release()

    def _end(self, future: asyncio.Future[Any]) -> None:
        if not future.cancelled():
            future.exception()  # looked at, whether or not somebody still streams
        self._tokens.put_nowait(None)

    def _completed(self, completed: Completed) -> bytes:
        spent = usage(self._job.work, completed)
        if self.reply is not None:
            self.reply.detail |= spent
        return _event(
            {
                "text": self._text.end(),
                "finish_reason": completed.finish_reason,
                "usage": spent,
            }
        )

    def _failed(self, problem: Problem) -> bytes:
        if self.reply is not None:
            self.reply.code = problem.kind.status
            self.reply.outcome = problem.kind.outcome
            self.reply.detail["problem"] = problem.kind.name
        return _event({"error": problem.document(self._request_id)})


def _event(value: dict[str, Any]) -> bytes:
    return b"data: " + dump(value) + b"\n\n"
