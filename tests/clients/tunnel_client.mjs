// Requests an http:// URL of Amazon's through a proxy, with a client that opens a tunnel even for that: undici's
// ProxyAgent.

import { ProxyAgent, fetch, request } from "undici";

const [proxy, url, token] = process.argv.slice(2);
const dispatcher = new ProxyAgent({ uri: proxy, ...(token ? { token: `Bearer ${token}` } : {}) });
const fetched = await fetch(url, { dispatcher });
const requested = await request(url, { dispatcher });
console.log(JSON.stringify({
    fetched: [fetched.status, await fetched.json()],
    requested: [requested.statusCode, await requested.body.json()],
}));
