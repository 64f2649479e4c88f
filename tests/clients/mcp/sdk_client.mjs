// Lists the tools of an MCP server with npm's @modelcontextprotocol/sdk and prints them, or what a person would see.

import { Client } from "@modelcontextprotocol/sdk/client/index.js";
import { StreamableHTTPClientTransport } from "@modelcontextprotocol/sdk/client/streamableHttp.js";

const client = new Client({ name: "adsidecar-test", version: "1" });
try {
    await client.connect(new StreamableHTTPClientTransport(new URL(process.argv[2])));
    console.log((await client.listTools()).tools.map((tool) => tool.name));
    process.exit(0);
} catch (error) {
    console.error(String(error));
    process.exit(1);
}
