"""A network with a round trip: a relay that delays each direction of its connections by half of it."""

import asyncio
import collections
import contextlib
import multiprocessing
import socket

from load import until
from stand_in import free_port

# Bytes on the way in one direction at most, which bounds the relay's memory.
ON_THE_WAY = 64 << 20


class Relay:
    """Delays each direction of its connections to `target`, and bounds what they carry together, as one link does."""

    def __init__(self, target: int, round_trip_ms: float, bytes_per_second: float | None):
        self.target, self.delay, self.speed = target, round_trip_ms / 2000, bytes_per_second
        # When the link is free again, there and back.
        self.free_at = [0.0, 0.0]
        self.port = free_port()
        # A process of its own, so that the callers here do not slow it down.
        self.process = multiprocessing.Process(target=lambda: asyncio.run(self.serve()), daemon=True)
        self.process.start()
        until("the relay listens", self.listens)

    def listens(self) -> bool:
        try:
            socket.create_connection(("127.0.0.1", self.port), 1).close()
        except OSError:
            return False
        return True

    async def serve(self) -> None:
        server = await asyncio.start_server(self.join, "127.0.0.1", self.port, limit=1 << 20, backlog=1000)
        await server.serve_forever()

    async def join(self, reader, writer) -> None:
        # The round trip of the TCP handshake.
        await asyncio.sleep(2 * self.delay)
        there, back = await asyncio.open_connection("127.0.0.1", self.target, limit=1 << 20)
        await asyncio.gather(self.pump(0, reader, back), self.pump(1, there, writer), return_exceptions=True)
        back.close()
        writer.close()

    async def pump(self, way: int, reader, writer) -> None:
        loop, queue, more, size = asyncio.get_running_loop(), collections.deque(), asyncio.Event(), 0
        room = asyncio.Event()

        async def deliver() -> None:
            nonlocal size
            while True:
                while not queue:
                    more.clear()
                    await more.wait()
                at, data = queue.popleft()
                if (wait := at - loop.time()) > 0:
                    await asyncio.sleep(wait)
                if not data:
                    writer.write_eof()
                    return
                size -= len(data)
                room.set()
                writer.write(data)
                await writer.drain()

        delivery, free_at = asyncio.create_task(deliver()), self.free_at
        try:
            while data := await reader.read(1 << 18):
                free_at[way] = max(free_at[way], loop.time()) + (len(data) / self.speed if self.speed else 0)
                queue.append((free_at[way] + self.delay, data))
                size += len(data)
                more.set()
                while size > ON_THE_WAY or self.speed and free_at[way] > loop.time() + 0.01:
                    room.clear()
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(room.wait(), 0.005)
            queue.append((max(free_at[way], loop.time()) + self.delay, b""))
            more.set()
            await delivery
        except OSError:
            delivery.cancel()
            writer.close()
