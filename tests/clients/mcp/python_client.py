"""Lists the tools of an MCP server with PyPI's `mcp`, or with `fastmcp`, and prints them, or what a person would
see."""

import asyncio
import sys
import traceback


async def with_mcp(url: str) -> list[str]:
    from mcp import ClientSession
    from mcp.client.streamable_http import streamable_http_client

    async with streamable_http_client(url) as streams, ClientSession(streams[0], streams[1]) as session:
        await session.initialize()
        return [tool.name for tool in (await session.list_tools()).tools]


async def with_fastmcp(url: str) -> list[str]:
    from fastmcp import Client

    async with Client(url) as client:
        return [tool.name for tool in await client.list_tools()]


library, url = sys.argv[1:]
try:
    print(asyncio.run({"mcp": with_mcp, "fastmcp": with_fastmcp}[library](url)))
except BaseException as error:  # an ExceptionGroup, of which Python prints every member
    traceback.print_exception(error)
    sys.exit(1)
