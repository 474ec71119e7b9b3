"""An answer as server-sent events: how far generating is, then every image, as OpenAI streams it.

: step 3 of 16                      a comment, which clients pass over and the page shows
event: image_generation.completed   one for every image, with b64_json (image_edit.completed)
event: error                        in place of what cannot be generated any more
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

from runtime.serve.image_request import Refused

if TYPE_CHECKING:
    from runtime.serve.jobs import Generated, Job

COMPLETED = "image_generation.completed"  # read: OpenAI's API
EDITED = "image_edit.completed"
Steps = asyncio.Queue[tuple[int, int]]
Task = asyncio.Task[tuple["Job", "Generated"]]


async def begun(task: Task, steps: Steps) -> None:
    """Returns with the first step, or raises what `task` raises before it: with its own status."""
    first = asyncio.ensure_future(steps.get())
    await asyncio.wait({task, first}, return_when=asyncio.FIRST_COMPLETED)
    if first.done():
        steps.put_nowait(first.result())
    else:
        first.cancel()
    if task.done():
        task.result()


async def events(task: Task, steps: Steps, answer: Any) -> AsyncIterator[bytes]:
    """The events of a job. answer(job, generated): the JSON that is sent without streaming."""
    try:
        while not task.done():
            step = asyncio.ensure_future(steps.get())
            await asyncio.wait({task, step}, return_when=asyncio.FIRST_COMPLETED)
            if not step.done():
                step.cancel()
                break
            done, total = step.result()
            yield f": step {done} of {total}\n\n".encode()
        job, generated = await task
        whole = answer(job, generated)
        name = EDITED if job.request.edit else COMPLETED
        for item in whole["data"]:
            yield event(
                name,
                {
                    "type": name,
                    **item,
                    "created_at": whole["created"],
                    "output_format": whole["output_format"],
                    "size": whole["size"],
                    "quality": "auto",
                    "background": "opaque",
                    "usage": {"input_tokens": 0, "output_tokens": 0, "total_tokens": 0},
                    "d2m": whole["d2m"],
                },
            )
    except Refused as error:
        yield event("error", {"type": "error", "error": error.row()})
    finally:
        task.cancel()  # of a client that left; one that is done stays so


def event(name: str, data: dict[str, Any]) -> bytes:
    """One event with JSON data."""
    return f"event: {name}\ndata: {json.dumps(data, ensure_ascii=False)}\n\n".encode()
