//! The catalogue of failures, attacks (threats) and mistakes of real users (situations), and the tests that cover each.
//!
//! A comment above a test names what it covers: `// Covers: failure 16.` in Rust, `# Covers: threat 6.` in Python. The
//! tables in `tests/README.md` are generated from these comments. After a change run `UPDATE_CATALOGUE=1 cargo nextest
//! run -E 'test(catalogue)'`.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};

use crate::floors::rust_files;

const FAILURES: &[(u32, &str)] = &[
    // The token endpoint.
    (1, "LWA refuses connections while the access token is valid"),
    (2, "LWA is down and the access token has expired"),
    (3, "LWA accepts the connection but does not respond"),
    (4, "LWA responds with 500, 502, 503"),
    (5, "LWA responds with 429"),
    (6, "LWA responds with 200 with a body that is not JSON"),
    (7, "LWA's response is truncated"),
    (8, "the response contains no refresh token"),
    (9, "the response contains another refresh token"),
    (10, "expires_in is missing"),
    (11, "expires_in is negative or 0"),
    (12, "expires_in is huge, a fraction, a string"),
    (13, "token_type is missing, or not bearer"),
    (14, "the access token is not a valid header value"),
    (15, "the response is too large, nested too deeply, or has duplicate keys"),
    (16, "invalid_grant"),
    (17, "invalid_client"),
    (18, "unauthorized_client, invalid_scope"),
    (19, "LWA redirects the request"),
    (20, "LWA's certificate is invalid"),
    (21, "LWA's host name does not resolve"),
    (22, "a thousand callers at expiry"),
    (23, "the caller that started a refresh disconnects"),
    (24, "a crash between LWA's response and the write to disk"),
    (25, "a refreshed grant cannot be written to disk"),
    (26, "a refresh panics"),
    (27, "the background and a caller refresh at the same time"),
    (28, "a thousand users at startup"),
    // The clock.
    (29, "the wall clock jumps forward"),
    (30, "the wall clock jumps backward"),
    (31, "the wall clock is at 1970"),
    (32, "the node was suspended"),
    (33, "the clocks of replicas differ"),
    // The store.
    (34, "the disk is full at startup"),
    (35, "the disk fills later"),
    (36, "SIGKILL at any system call"),
    (37, "the power is cut"),
    (38, "a second process on the same store"),
    (39, "a damaged database"),
    (40, "a read fails after the store was opened"),
    (41, "disk operations hang"),
    (42, "fsync fails"),
    (43, "a wrong Fernet key"),
    (44, "a malformed Fernet key"),
    (45, "the Fernet keys are rotated"),
    (46, "the old key is removed too early"),
    (47, "replicas with different keys"),
    (48, "a record is swapped or rolled back"),
    (49, "PostgreSQL is down"),
    (50, "PostgreSQL fails over in the middle of a refresh"),
    (51, "the connection pool is exhausted, or pools by transaction"),
    (52, "the schema has another version"),
    (53, "the volume is read-only, or owned by another user"),
    // Upstream and proxying.
    (54, "401 for an access token that has not expired"),
    (55, "403"),
    (56, "429"),
    (57, "Amazon is unreachable"),
    (58, "the server closes an idle connection as a request checks it out"),
    (59, "a reset before any byte of the response"),
    (60, "a reset in the middle of the response"),
    (61, "Amazon does not respond in time"),
    (62, "a response before the request was read"),
    (63, "1xx"),
    (64, "hop-by-hop headers, cookies, an oversized response head"),
    (65, "a compressed response"),
    (66, "a bodiless response with a body"),
    (67, "HTTP/2: GOAWAY, resets, floods"),
    (68, "the caller disconnects in the middle of an upload"),
    (69, "the caller disconnects while it waits"),
    (70, "a caller that does not read"),
    (71, "an oversized head, too many headers, an oversized target"),
    (72, "trailers"),
    (73, "Expect: 100-continue"),
    (74, "Upgrade, CONNECT, TRACE"),
    (75, "HTTP/1.0"),
    (76, "a hundred pipelined requests"),
    (77, "forms of the request target"),
    (78, "ambiguous framing"),
    (79, "Host missing, duplicate, or not a host name"),
    (80, "Authorization duplicate, in variant spellings, or listed in Connection"),
    (81, "dot segments and encoded slashes"),
    // OAuth.
    (82, "the callback reports access_denied"),
    (83, "the callback lacks parameters, or repeats them"),
    (84, "a state that is expired, unknown, or used"),
    (85, "a duplicate callback"),
    (86, "two concurrent logins of one user"),
    (87, "a restart between login and callback"),
    (88, "the exchange fails"),
    (89, "a smaller scope than requested"),
    (90, "another Amazon identity"),
    (91, "a frontend URL that leads to another origin"),
    (92, "a flood of logins"),
    (93, "logout during a refresh"),
    (94, "a login immediately after a logout"),
    (95, "a request in flight at logout"),
    // The process.
    (96, "SIGTERM under load"),
    (97, "a second SIGTERM, or the end of the drain"),
    (98, "SIGKILL"),
    (99, "the process is out of file descriptors"),
    (100, "ten thousand idle connections"),
    (101, "the memory budget is exhausted"),
    (102, "the process gets no CPU time"),
    (103, "a panic"),
    (104, "an invalid configuration"),
    (105, "secret files change"),
    (106, "the log is not read"),
    (107, "secrets in logs, metrics and errors"),
    (108, "a core dump"),
    (109, "a flood of scrapes"),
    (110, "misleading liveness"),
];

const THREATS: [&str; 42] = [
    "DNS rebinding: a page under its own host name reaches the proxy",
    "a cross-site form or image changes campaigns",
    "a CORS preflight requests access to the private network",
    "an app that is tricked into fetching a URL reaches the proxy (SSRF)",
    "another machine reaches the listeners",
    "login CSRF: an attacker's code in the victim's browser",
    "a code from another login is injected",
    "a login state is fixed in advance or guessed",
    "a login state or a callback is replayed",
    "an open redirect through the frontend URL or return_to",
    "code or state leaks by Referer, history or cache",
    "script reflected in the callback's error page",
    "another site logs a user out or in",
    "a caller sets credentials, or variant spellings of managed headers",
    "a Connection header strips attached headers",
    "request smuggling to the pooled upstream connection",
    "leftover body bytes become a request",
    "Upgrade, CONNECT and h2c tunnels bypass the checks",
    "SSRF through the absolute form, the authority form or Host",
    "path tricks escape the API",
    "header injection through configured values",
    "an app reads tokens through the proxy",
    "a caller gets another user's token",
    "slow heads, slow bodies, slow readers, many connections",
    "memory and CPU exhausted by heads, bodies, chunks",
    "the disk is stolen",
    "a stored record is swapped or rolled back",
    "limits of Fernet: no associated data, visible length and time",
    "an attacker writes rows into PostgreSQL",
    "a forged or garbled token response",
    "an upstream redirect receives the bearer token",
    "HTTP_PROXY in the environment diverts tokens",
    "an invalid TLS certificate or version",
    "a smuggled or split upstream response",
    "secrets in logs, panics and traces from libraries",
    "metrics leak users or paths, or grow without bound",
    "another process of the same user reads environment, memory or core",
    "a malicious or vulnerable dependency",
    "two processes on one volume",
    "a wrong key on good data",
    "development settings in production",
    "the admin listener is used for an attack",
];

/// What users of systems like this one have reported in public, and what went wrong here when it was tried.
const SITUATIONS: [&str; 35] = [
    "a destructive endpoint gets its filter in the body, or under a misspelt name",
    "a selecting header is misspelt, or spelt with an underscore",
    "a load balancer ends an HTTP/2 connection with GOAWAY; the streams behind it were not processed",
    "an HTTP/2 server refuses a stream on a new connection (REFUSED_STREAM)",
    "a NAT forgets an HTTP/2 connection, and new connections work",
    "a login begins at 127.0.0.1, and its redirect URI is at localhost",
    "a browser prefetches the callback and spends the code",
    "the callback is delivered twice, or its page is reloaded",
    "somebody without the cookie fetches the callback first",
    "a credential keeps the quotes of its env file",
    "a whole JSON secret stands where one value belongs",
    "another text stands where the refresh token belongs: percent-encoded, NAME=value, b'…', an access token, a code",
    "a filter, an egress proxy or a captive portal answers in the place of Login with Amazon",
    "TLS to Login with Amazon or to Amazon Ads is intercepted",
    "this machine's clock is wrong by months, so no certificate is valid",
    "a Fernet key is in the standard base64 alphabet",
    "a home-grown store wrote str(bytes), or a line end behind the token",
    "a token store wrote its times as seconds since 1970, RFC 1123 or {\"$date\": …}",
    "the base URL ends with a slash, so the paths begin with two",
    "the redirect URI has another path, or a final slash",
    "a health check sends HEAD",
    "a tool sends an optional header blank",
    "an MCP client that is built on a browser cannot help sending Sec-Fetch-Site",
    "an MCP client looks for an OAuth server of its own",
    "a load balancer wants 200 at the port that it routes to",
    "systemd waits for READY=1",
    "Host names one of Amazon's regions, in origin form",
    "a search domain resolves Amazon's host to another address",
    "Amazon's 401 about the scope is compressed with brotli",
    "a query holds a bare quote",
    "the caller's X-Request-Id is too long, blank, or not ASCII",
    "a scope is written with commas, + or %3A",
    "a command's output is piped into a program that ends",
    "Login with Amazon, or something before it, answers with a compressed body",
    "an HTTP/2 server asks for HTTP/1.1 for one stream",
];

const BEGIN: &str = "<!-- catalogue -->\n";
const END: &str = "<!-- end -->";

#[test]
fn each_failure_threat_and_situation_is_covered_by_a_test_and_listed_in_the_manual() {
    let covered = covered();
    let threats = (1..).zip(THREATS).map(|(number, text)| ("threat", number, text));
    let situations = (1..).zip(SITUATIONS).map(|(number, text)| ("situation", number, text));
    let rows = FAILURES.iter().map(|(number, text)| ("failure", *number, *text)).chain(threats).chain(situations);
    let (mut table, mut missing) = (String::new(), Vec::new());
    for (kind, number, text) in rows {
        if number == 1 {
            write!(table, "\n| {kind} | what happens | tests |\n|---|---|---|\n").unwrap();
        }
        match covered.get(&(kind.to_owned(), number)) {
            Some(tests) => writeln!(table, "| {number} | {text} | `{}` |", tests.join("`, `")).unwrap(),
            None => missing.push(format!("{kind} {number}: {text}")),
        }
    }
    assert!(missing.is_empty(), "not covered by any test: {missing:#?}");
    let manual = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/README.md");
    let text = fs::read_to_string(&manual).unwrap();
    let (before, rest) = text.split_once(BEGIN).expect("tests/README.md has the mark");
    let (stands, after) = rest.split_once(END).expect("tests/README.md has the end mark");
    if std::env::var_os("UPDATE_CATALOGUE").is_some() {
        fs::write(&manual, format!("{before}{BEGIN}{table}\n{END}{after}")).unwrap();
    } else {
        assert!(stands.trim() == table.trim(), "tests/README.md is stale: run with UPDATE_CATALOGUE=1");
    }
}

/// Known-bad: a comment that no test follows covers nothing, nor does a test that is ignored or asserts nothing.
#[test]
fn only_a_test_that_runs_and_asserts_covers_what_its_comment_says() {
    let covered = |text: &str| tests_in(text).into_iter().map(|(_, number, test)| format!("{number} {test}")).collect();
    let of = |text: &str| -> Vec<String> { covered(text) };
    let body = "fn promise() {\n    assert!(true)\n}\n";
    assert_eq!(of(&format!("#[test]\n// Covers: failure 2.\n{body}")), ["2 promise"]);
    assert_eq!(
        of(&format!("#[test]\n// Covers: failure 2.\n// Covers: threat 3.\n{body}")),
        ["2 promise", "3 promise"]
    );
    let linux =
        "#[cfg(target_os = \"linux\")]\n#[tokio::test(flavor = \"multi_thread\")]\n// Covers: failure 2.\nasync ";
    assert_eq!(of(&format!("{linux}{body}")), ["2 promise"]);
    for bad in [
        format!("// Covers: failure 1.\n{body}"),
        format!("#[cfg(test)]\n// Covers: failure 1.\n{body}"),
        format!("#[test]\n#[ignore]\n// Covers: failure 1.\n{body}"),
        format!("#[test]\n#[ignore = \"slow\"]\n// Covers: failure 1.\n{body}"),
        format!("#[test]\n// Covers: failure 1.\nfn empty() {{}}\n{body}"),
        format!("#[test]\n// Covers: failure 1.\nfn asks_nothing() {{\n    // assert!(true)\n    run();\n}}\n{body}"),
    ] {
        assert_eq!(of(&bad), Vec::<String>::new(), "{bad}");
    }
    let python = "def test_promise():\n    assert True\n\n";
    assert_eq!(of(&format!("# Covers: failure 2.\n{python}")), ["2 test_promise"]);
    for bad in [
        "# Covers: failure 1.\ndef promise():\n    assert True\n".to_owned(),
        format!("# Covers: failure 1.\ndef test_nothing():\n    run()\n\n{python}"),
        format!("@pytest.mark.skip\n# Covers: failure 1.\n{python}"),
        format!("# Covers: failure 1.\n@pytest.mark.xfail\n{python}"),
    ] {
        assert_eq!(of(&bad), Vec::<String>::new(), "{bad}");
    }
}

/// For each failure or threat, the names of the tests that cover it.
fn covered() -> BTreeMap<(String, u32), Vec<String>> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let sources = [root.join("src"), root.join("tests")].into_iter().flat_map(|directory| rust_files(&directory));
    let mut found = BTreeMap::<_, Vec<String>>::new();
    for file in sources.chain(python_files(&root.join("tests"))) {
        for (kind, number, test) in tests_in(&fs::read_to_string(&file).unwrap()) {
            found.entry((kind, number)).or_default().push(test);
        }
    }
    found.values_mut().for_each(|tests| tests.sort());
    found
}

/// What each comment covers, with the name of the test below it. In Rust, the test's attribute precedes the comment.
fn tests_in(text: &str) -> Vec<(String, u32, String)> {
    let lines: Vec<_> = text.lines().collect();
    let others = asserting(&lines);
    let is_above = |line: &&&str| line.trim().starts_with(['#', '@']) || line.trim().starts_with("//");
    let mut found = Vec::new();
    for (at, line) in lines.iter().enumerate() {
        let line = line.trim();
        let comment =
            line.strip_prefix("// ").or(line.strip_prefix("# ")).and_then(|line| line.strip_prefix("Covers: "));
        let Some((kind, number)) = comment.and_then(|covers| covers.strip_suffix('.')?.split_once(' ')) else {
            continue;
        };
        let first = at - lines[..at].iter().rev().take_while(is_above).count();
        let function = at + lines[at..].iter().take_while(is_above).count();
        let (above, Some(head)) = (&lines[first..function], lines.get(function)) else { continue };
        let has = |sign: &str| above.iter().any(|line| line.trim().starts_with(sign));
        let head = head.trim().strip_prefix("async ").unwrap_or(head.trim());
        let rust =
            head.strip_prefix("fn ").filter(|_| has("#[test]") || has("#[tokio::test")).filter(|_| !has("#[ignore"));
        let python = head.strip_prefix("def ").filter(|name| name.starts_with("test_"));
        let python = python.filter(|_| !has("@pytest.mark.skip") && !has("@pytest.mark.xfail"));
        if let (Some(name), Ok(number)) = (rust.or(python), number.parse())
            && asserts(&lines[function..], &others)
        {
            found.push((kind.to_owned(), number, name.split('(').next().unwrap_or_default().to_owned()));
        }
    }
    found
}

/// The names of the functions in this file that assert something themselves.
fn asserting(lines: &[&str]) -> Vec<String> {
    let name = |line: &str| {
        let (_, rest) = line.split_once("fn ").or(line.split_once("def "))?;
        let name: String = rest.chars().take_while(|char| char.is_alphanumeric() || *char == '_').collect();
        (!line.trim().starts_with("//") && !name.is_empty()).then_some(name)
    };
    let functions = lines.iter().enumerate().filter_map(|(at, line)| Some((at, name(line)?)));
    functions.filter(|(at, _)| asserts(&lines[*at..], &[])).map(|(_, name)| name).collect()
}

/// Whether the function that begins with these lines asserts something, or calls one of `others`, which do. Its end is
/// the first line that is not indented more than its head, or in Rust the closing brace there.
fn asserts(lines: &[&str], others: &[String]) -> bool {
    let indent = |line: &str| line.len() - line.trim_start().len();
    // rustfmt and ruff break long heads, whose last line is not indented more either.
    let mut body = lines.iter().skip(1).take_while(|line| {
        let text = line.trim();
        text.is_empty() || indent(line) > indent(lines[0]) || text.starts_with(')') || text == "where"
    });
    body.any(|line| {
        let line = line.trim();
        let calls = |name: &String| line.contains(&format!("{name}("));
        let is_code = !line.starts_with("//") && !line.starts_with('#');
        is_code && (line.contains("assert") || line.contains("pytest.raises") || others.iter().any(calls))
    })
}

fn python_files(directory: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
    let (directories, files): (Vec<_>, Vec<_>) = entries.partition(|path| path.is_dir());
    let here = files.into_iter().filter(|file| file.extension().is_some_and(|extension| extension == "py"));
    here.chain(directories.iter().flat_map(|directory| python_files(directory))).collect()
}
