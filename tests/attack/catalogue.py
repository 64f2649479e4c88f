"""Bad requests, and unusual legal ones: the bytes sent, and the expected outcome.

Compiled from RFC 9112 and RFC 9110, with the tiers of the crate http_desync_guardian and the ideas of public lists of
request-smuggling findings. `MARK` is replaced by the case's own header, which identifies its requests at Amazon.
"""

from dataclasses import dataclass

MARK = "\0mark\0"
ECHO = "/sandbox/echo"


@dataclass(frozen=True)
class Outcome:
    """`status` 0: no response at all is also correct. `reaches` is the request that Amazon gets: method, target and
    body, or
    `None` if no complete request may reach it; its response passes, whatever its status. `kept`: the next request on
    the connection is served too."""

    status: int
    code: str = ""
    kept: bool = False
    reaches: tuple[str, str, str] | None = None


@dataclass(frozen=True)
class Case:
    group: str
    name: str
    raw: bytes
    outcome: Outcome
    # The caller closes its sending side.
    ends: bool = False


# The parser's own rejection, without a body; the connection closes.
BARE = Outcome(400)
# The parser's own too, with our document.
TOO_LARGE = Outcome(431, "headers_too_large")
REFUSED = Outcome(400, "bad_request")
# Rejected, but the connection stays open: the framing was clear.
REFUSED_KEPT = Outcome(400, "bad_request", kept=True)
WRONG_HOST = Outcome(403, "host_not_allowed", kept=True)
NO_METHOD = Outcome(405, "method_not_allowed")
# The head was valid, the body was not: at most a 400, and never a complete request.
NEVER_WHOLE = Outcome(0, "bad_request")


def passes(method: str = "POST", target: str = ECHO, body: str = "", kept: bool = True) -> Outcome:
    return Outcome(200, kept=kept, reaches=(method, target, body))


def posted(*lines: str, body: str = "", line: str = f"POST {ECHO} HTTP/1.1") -> bytes:
    return "\r\n".join([line, f"{MARK}Host: localhost", *lines, "", body]).encode("latin-1")


def got(target: str = ECHO, *lines: str, method: str = "GET", host: str = "Host: localhost") -> bytes:
    return "\r\n".join([f"{method} {target} HTTP/1.1", f"{MARK}{host}", *lines, "", ""]).encode("latin-1")


def transfer_encodings():
    """RFC 9112, section 6.1: exactly one, exactly `chunked`."""
    chunked = "5\r\nabcde\r\n0\r\n\r\n"
    ambiguous = [
        "gzip, chunked", "deflate, chunked", "identity, chunked", ",chunked", ", chunked", "chunked, chunked",
        "chunked,chunked", "br,chunked", "x,chunked", "chunked;q=1, chunked", "identity,\tchunked", "gzip,,chunked",
        '"chunked", chunked', "cow, chunked", "compress, gzip, chunked", "chunked,gzip,chunked", "trailers, chunked",
    ]
    for coding in ambiguous:
        yield coding, posted(f"Transfer-Encoding: {coding}", body=chunked), REFUSED
        yield f"{coding}, with a length", posted("Content-Length: 5", f"Transfer-Encoding: {coding}",
                                                 body=chunked), REFUSED
    for first, second in [("chunked", "chunked"), ("gzip", "chunked"), ("identity", "chunked"), ("", "chunked"),
                          ("x", "chunked"), ("chunked", "Chunked"), ("cow", "chunked")]:
        lines = [f"Transfer-Encoding: {first}", f"Transfer-Encoding: {second}"]
        yield f"two lines: {first}, {second}", posted(*lines, body=chunked), REFUSED
        twins = [lines[0], "X-Between: 1", lines[1].lower()]
        yield f"two lines apart: {first}, {second}", posted(*twins, body=chunked), REFUSED
    never = [
        "", "xchunked", "chunkedx", "chunked;q=1", "chunked, identity", "chunked, gzip", "identity", "gzip", "chunk",
        '"chunked"', "'chunked'", "chunked\x0b", "\x0bchunked", "\x0cchunked", "chunked,", "chunked ,", "chunked, ",
        "chunked\xa0", "\xa0chunked", "\x85chunked", "ch\xfcnked", "chun\tked", "chunked\tx", "0", "true", "{chunked}",
        "chunked:x", "=chunked", "(chunked)",
    ]
    for coding in never:
        yield repr(coding), posted(f"Transfer-Encoding: {coding}", body=chunked), BARE
    for line in ["Transfer-Encoding : chunked", "Transfer-Encoding\t: chunked", " Transfer-Encoding: chunked",
                 "\tTransfer-Encoding: chunked", "Transfer-Encoding\x0b: chunked", "Transfer-Encoding\0: chunked",
                 "Transfer-Encoding: chunked\0", "Transfer-Encoding:\0chunked", "Transfer-Encoding",
                 "Transfer-Encoding:\r\n chunked",
                 "X: y\r\n Transfer-Encoding: chunked", "X: y\rTransfer-Encoding: chunked",
                 "Transfer-Encoding:\rchunked",
                 "Transfer-Encoding: chunked\r", "Transfer Encoding: chunked", "\xa0Transfer-Encoding: chunked",
                 "Transfer-Encoding\xa0: chunked", "(Transfer-Encoding): chunked", "Transfer-Encoding=chunked"]:
        yield repr(line), posted(line, body=chunked), BARE
    old = f"POST {ECHO} HTTP/1.0"
    yield "in HTTP/1.0", posted("Transfer-Encoding: chunked", line=old, body=chunked), BARE
    both = ["Transfer-Encoding: chunked", "Content-Length: 5", "Connection: keep-alive"]
    yield "with a length in HTTP/1.0", posted(*both, line=old, body=chunked), BARE
    for lines in [["Content-Length: 3", "Transfer-Encoding: chunked"], ["Transfer-Encoding: chunked",
                                                            "Content-Length: 60"],
                  ["Transfer-Encoding: Chunked", "Content-Length: 0"], ["Content-Length: 5",
                                                            "Transfer-Encoding: CHUNKED"]]:
        # RFC 9112, section 6.3: read as chunked, and nothing after it is served.
        yield " beside ".join(lines), posted(*lines, body=chunked), passes(body="abcde", kept=False)
    for line in ["Transfer-Encoding: chunked", "transfer-encoding:chunked", "TRANSFER-ENCODING:  CHUNKED  ",
                 "Transfer-Encoding:\tchunked\t", "tRANSFER-eNCODING: cHuNkEd"]:
        yield repr(line), posted(line, body=chunked), passes(body="abcde")
    for line in ["Transfer_Encoding: chunked", "X-Transfer-Encoding: chunked", "Content-Encoding: chunked",
                 "Transfer-Encoding-: chunked", "Transfer.Encoding: chunked", "Transfer-Encodin: chunked"]:
        # A different header: the length applies.
        yield f"{line}, which is none", posted("Content-Length: 3", line, body="abc"), passes(body="abc")


def content_lengths():
    """RFC 9112, section 6.2."""
    for length in ["+3", "-3", "-0", "0x3", "3.0", "3,3", "3, 3", "3 3", "3;", "", "three", "3\x0b", "\x0b3", "3\xa0",
                   "3_0", "1e1",
                   "03x", "\xb23", "3\0", "\0003", "3\r", "٣".encode().decode("latin-1"), "0b11", "3\t4", "(3)", '"3"',
                   "3,", ",3", "--3",
                   "NaN", "Infinity", "3/1"]:
        yield repr(length), posted(f"Content-Length: {length}", body="abc"), BARE
    for first, second in [("3", "4"), ("0", "3"), ("3", "0"), ("3", "03x"), ("3", "-3"), ("3", ""), ("", "3"), ("3",
                                                            "+3")]:
        yield f"two: {first!r}, {second!r}", posted(f"Content-Length: {first}", f"Content-Length: {second}",
                                                    body="abc"), BARE
        apart = [f"Content-Length: {first}", "X: y", f"content-length: {second}"]
        yield f"two apart: {first!r}, {second!r}", posted(*apart, body="abc"), BARE
    for line in ["Content-Length : 3", " Content-Length: 3", "Content-Length\t: 3", "Content-Length",
                 "Content-Length:\r\n 3",
                 "Content Length: 3", "Content-Length\0: 3", "X: y\r\n Content-Length: 3", "X: y\rContent-Length: 3",
                 "\x0bContent-Length: 3", "Content-Length\xa0: 3"]:
        yield repr(line), posted(line, body="abc"), BARE
    for length in ["18446744073709551615", "18446744073709551614"]:
        # hyper's own limit; the status is unusual, but nothing passes.
        yield length, posted(f"Content-Length: {length}", body="abc"), TOO_LARGE
    for length in ["18446744073709551616", "99999999999999999999999", "184467440737095516150"]:
        yield length, posted(f"Content-Length: {length}", body="abc"), BARE
    for lines in [["Content-Length: 3"], ["content-length:3"], ["Content-Length:   3  "], ["Content-Length: 03"],
                  ["Content-Length: 3", "Content-Length: 3"], ["Content-Length: 0000000003"]]:
        yield f"{lines}, which is legal", posted(*lines, body="abc"), passes(body="abc")
    for line in ["Content_Length: 30", "X-Content-Length: 30", "Content-Length-: 30", "Content.Length: 30"]:
        yield f"{line}, which is none", posted("Content-Length: 3", line, body="abc"), passes(body="abc")
    yield "a GET with a body", got(ECHO, "Content-Length: 3") + b"abc", passes("GET", body="abc")
    call = "GET /smuggled HTTP/1.1\r\nHost: localhost\r\n\r\n"
    yield "a GET whose body is a call", got(ECHO, f"Content-Length: {len(call)}") + call.encode(), passes("GET",
                                                            body=call)
    yield "a DELETE with a body", got(ECHO, "Content-Length: 3", method="DELETE") + b"abc", passes("DELETE", body="abc")
    yield "no length and no body", posted(), passes()
    yield "a length of 0", posted("Content-Length: 0"), passes()


def chunked_bodies():
    """RFC 9112, section 7.1."""
    for body in ["x\r\nabcde\r\n0\r\n\r\n", "0x5\r\nabcde\r\n0\r\n\r\n", "+5\r\nabcde\r\n0\r\n\r\n",
                 "-5\r\nabcde\r\n0\r\n\r\n",
                 "-1\r\nabcde\r\n0\r\n\r\n", "_5\r\nabcde\r\n0\r\n\r\n", "5_0\r\nabcde\r\n0\r\n\r\n",
                 "5 5\r\nabcde\r\n0\r\n\r\n",
                 "\r\nabcde\r\n0\r\n\r\n", ";x\r\nabcde\r\n0\r\n\r\n", "5\nabcde\n0\n\n", "5\nabcde\r\n0\r\n\r\n",
                 "5\rabcde\r\n0\r\n\r\n", "5\r\rabcde\r\n0\r\n\r\n", "5\r\nabcde\n0\r\n\r\n", "5\r\nabcde\r0\r\n\r\n",
                 "5\r\nabcde0\r\n\r\n", "5\r\nabcdeX\r\n0\r\n\r\n", "3\r\nabcde\r\n0\r\n\r\n",
                 "4\r\nabcde\r\n0\r\n\r\n",
                 "FFFFFFFFFFFFFFFFF\r\nabcde\r\n0\r\n\r\n", "FFFFFFFFFFFFFFFF5\r\nabcde\r\n0\r\n\r\n",
                 "10000000000000005\r\nabcde\r\n0\r\n\r\n", "5g\r\nabcde\r\n0\r\n\r\n", "g5\r\nabcde\r\n0\r\n\r\n",
                 "5,\r\nabcde\r\n0\r\n\r\n",
                 "5\0\r\nabcde\r\n0\r\n\r\n", "\0" "5\r\nabcde\r\n0\r\n\r\n", "5\xa0\r\nabcde\r\n0\r\n\r\n",
                 "\x0b5\r\nabcde\r\n0\r\n\r\n",
                 "5\x0c\r\nabcde\r\n0\r\n\r\n", "5;a\nb\r\nabcde\r\n0\r\n\r\n", "5;\n\r\nabcde\r\n0\r\n\r\n",
                 "5; x=\ry\r\nabcde\r\n0\r\n\r\n",
                 "5\r\nabcde\r\n0\r\nX Y\r\n\r\n", "5\r\nabcde\r\n0\r\n: y\r\n\r\n",
                 "5\r\nabcde\r\n0\r\nX: a\0b\r\n\r\n", "5\r\nabcde\r\n0\r\n X: y\r\n\r\n",
                 "5\r\nabcde\r\n0\n\r\n", "5\r\nabcde\r\n-0\r\n\r\n", "5\r\nabcde\r\n0x0\r\n\r\n",
                 f"5;{'x' * 20000}\r\nabcde\r\n0\r\n\r\n", "٥".encode().decode("latin-1") + "\r\nabcde\r\n0\r\n\r\n",
                 "\r\n5\r\nabcde\r\n0\r\n\r\n", "\xef\xbc\x95\r\nabcde\r\n0\r\n\r\n", "5 \t5\r\nabcde\r\n0\r\n\r\n",
                 "0 0\r\n\r\n"]:
        yield repr(body[:40]), posted("Transfer-Encoding: chunked", body=body), NEVER_WHOLE
        if len(body) < 60:
            yield f"{body!r} behind a good chunk", posted("Transfer-Encoding: chunked",
                                                          body="4\r\nwxyz\r\n" + body), NEVER_WHOLE
    for body, whole in [("5\r\nabcde\r\n0\r\n\r\n", "abcde"), ("00005\r\nabcde\r\n000\r\n\r\n", "abcde"),
                        ("A\r\nabcdefghij\r\n0\r\n\r\n", "abcdefghij"),
                        ("a\r\nabcdefghij\r\n0\r\n\r\n", "abcdefghij"), ("5;x=y\r\nabcde\r\n0;z\r\n\r\n", "abcde"),
                        ('5;x="y"\r\nabcde\r\n0\r\n\r\n', "abcde"), ("1\r\na\r\n1\r\nb\r\n0\r\n\r\n", "ab"),
                        ("0\r\n\r\n", ""),
                        ("5\r\n0\r\n\r\n\r\n0\r\n\r\n", "0\r\n\r\n"), ("5\r\nabcde\r\n0\r\nX-Trailer: y\r\n\r\n",
                                                            "abcde"),
                        ("5\r\nabcde\r\n0\r\nContent-Length: 3\r\n\r\n", "abcde"),
                        ("5\r\nabcde\r\n0\r\nTransfer-Encoding: chunked\r\n\r\n", "abcde"),
                        ("5\r\nabcde\r\n0\r\nAuthorization: x\r\nHost: evil\r\n\r\n", "abcde")]:
        yield f"{body!r}, which is legal", posted("Transfer-Encoding: chunked", body=body), passes(body=whole)


def request_lines():
    """RFC 9112, section 3."""
    host = f"{MARK}Host: localhost\r\n\r\n"
    for line in [f"GET {ECHO}", f"GET {ECHO} ", f"GET  {ECHO} HTTP/1.1", f"GET {ECHO}  HTTP/1.1",
                 f"GET {ECHO} HTTP/1.1 ", f" GET {ECHO} HTTP/1.1",
                 f"\tGET {ECHO} HTTP/1.1", f"GET\t{ECHO} HTTP/1.1", f"GET {ECHO}\tHTTP/1.1", f"GET {ECHO} HTTP/1.1x",
                 f"GET {ECHO} http/1.1", f"GET {ECHO} HTTP/1.2",
                 f"GET {ECHO} HTTP/1.9", f"GET {ECHO} HTTP/1.", f"GET {ECHO} HTTP/.1", f"GET {ECHO} HTTP/11",
                 f"GET {ECHO} HTTP/01.1", f"GET {ECHO} HTTP/1.01",
                 f"GET {ECHO} HTTP/2.0", f"GET {ECHO} HTTP/3.0", f"GET {ECHO} HTTP/0.9", f"GET {ECHO} HTTP/1,1",
                 f"GET {ECHO} HTTPS/1.1", f"GET {ECHO} HTP/1.1",
                 f"GET {ECHO} FTP/1.1", f"GET {ECHO} HTTP", f"GET {ECHO} HTTP/", f"GET {ECHO} HTTP/1.1 HTTP/1.1",
                 f"GET {ECHO} x HTTP/1.1", "GET HTTP/1.1", "GET",
                 f"GET {ECHO}\x0bHTTP/1.1", f"GET\x0b{ECHO} HTTP/1.1", f"GET\xa0{ECHO} HTTP/1.1",
                 f"\0GET {ECHO} HTTP/1.1", f"G\0ET {ECHO} HTTP/1.1",
                 f"GET {ECHO}\0 HTTP/1.1", f"GET {ECHO}?\x01 HTTP/1.1", f"GET {ECHO}?\x7f HTTP/1.1",
                 f"G(E)T {ECHO} HTTP/1.1", f"GET{{}} {ECHO} HTTP/1.1",
                 f"G@T {ECHO} HTTP/1.1", f"G/T {ECHO} HTTP/1.1", f"GET: {ECHO} HTTP/1.1", f"\"GET\" {ECHO} HTTP/1.1",
                 f"GET {ECHO} HTTP/1.1\r", f"GET {ECHO}\r HTTP/1.1", f"GE\rT {ECHO} HTTP/1.1"]:
        yield repr(line), f"{line}\r\n{host}".encode("latin-1"), BARE
    for line in [f"GET {ECHO}<x> HTTP/1.1", f'GET {ECHO}?a="b" HTTP/1.1', f'POST {ECHO}?"<>" HTTP/1.0']:
        yield repr(line), f"{line}\r\n{host}".encode("latin-1"), REFUSED
    yield "the preface of HTTP/2", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", Outcome(0)
    yield "a TLS client's first bytes", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"A" * 64 + b"\r\n\r\n", BARE
    yield "an SSH client's first bytes", b"SSH-2.0-OpenSSH_9.2\r\n\r\n", BARE
    yield "a mail", b"EHLO localhost\r\n\r\n", REFUSED
    yield "a Redis command", b"*1\r\n$4\r\nINFO\r\n\r\n", BARE
    yield "a PROXY line", b"PROXY TCP4 127.0.0.1 127.0.0.1 1 2\r\n" + got().replace(MARK.encode(), b""), BARE
    yield "empty lines first", b"\r\n\r\n" + got(), passes("GET")


def methods():
    """Those of RFC 9110 and RFC 5789, but neither tunnels nor echoes."""
    for method in ["TRACE", "TRACK", "PROPFIND", "PURGE", "get", "Get", "post", "FOO", "DEBUG", "LINK", "MOVE",
                   "SEARCH", "QUERY", "G", "GETT", "PUTT", "M-SEARCH",
                   "BASELINE-CONTROL", "X'Y", "GET!", "a.b", "VERSION_CONTROL", "~"]:
        yield method, got(method=method), NO_METHOD
    for target in ["advertising-api.amazon.com:443", "localhost:22", "evil.test:443", "evil.test:80",
                   "advertising-api.amazon.com.evil.test:80", "127.0.0.1:80"]:
        raw = f"CONNECT {target} HTTP/1.1\r\n{MARK}Host: {target}\r\n\r\n".encode()
        yield f"CONNECT {target}", raw, NO_METHOD
    for method in ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]:
        yield f"{method}, which is legal", got(method=method), passes(method)


def hosts():
    """RFC 9112, section 3.2, and the allowed hosts."""
    for host in ["evil.test", "evil.test:8001", "localhost.", "localhost.:80", "127.1", "127.0.1", "127.0.0.2",
                 "127.0.0.1.", "0x7f.1", "0x7f000001", "017700000001",
                 "2130706433", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "[0:0:0:0:0:0:0:1]", "[::01]", "[::1%25lo]",
                 "[::1%lo]", "[::1]x", "[::1", "::1", "::1:8001", "0.0.0.0", "0",
                 "localhost:", "localhost:x", "localhost:80:80", "localhost:99999", "localhost:-1", "localhost:+80",
                 "localhost: 80", "localhost :80", "localhost:0x50",
                 "localhost:80@evil", "u@localhost", "u:p@localhost", "evil#localhost", "evil?localhost", "localhost/",
                 "localhost/evil", "localhost\\evil", "/localhost",
                 "http://localhost", "//localhost", "localhost,evil", "localhost, localhost", "localhost;evil",
                 "localhost evil", "localhost\tevil", "%6cocalhost", "localhost%00",
                 "localhost%2eevil", "local\xadhost", "l\xf6calhost", "ｌocalhost".encode().decode("latin-1"),
                 "localhost.evil.test", "evil.localhost", "evil-localhost",
                 "localhost.localdomain", "ip6-localhost", "advertising-api.amazon.com", "api.amazon.com",
                 "advertising-api.amazon.com.evil.test", "*", "_", "-", "(localhost)",
                 "'localhost'", '"localhost"', "<localhost>", "localhost:8001.evil.test", "127.0.0.1.evil.test",
                 "127.0.0.1.nip.io", "lvh.me", "127。0。0。1".encode().decode("latin-1"),
                 "①②⑦.0.0.1".encode().decode("latin-1"), "localhost:80#", "0:80", "[::]", "[]", "[::1].evil"]:
        yield host.encode("latin-1").decode("utf-8", "replace"), got(host=f"Host: {host}"), WRONG_HOST
    for name, lines in [("none", ""), ("an empty one", "Host:"), ("a blank one", "Host:   "), ("two",
                                                            "Host: localhost\r\nHost: localhost"),
                        ("two, the second foreign", "Host: localhost\r\nHost: evil.test"),
                        ("two, the first foreign", "Host: evil.test\r\nHost: localhost"), ("two in other cases",
                                                            "host: localhost\r\nHOST: evil.test"), ("three",
                                                            "Host: localhost\r\nHost: localhost\r\nHost: localhost"),
                        ("two, one empty", "Host: localhost\r\nHost:"), ("another name for it", "Hos: localhost"),
                        ("one with a space in the name's place", "X-Host: localhost")]:
        raw = f"GET {ECHO} HTTP/1.1\r\n{MARK}{lines}\r\n\r\n".replace("\r\n\r\n\r\n", "\r\n\r\n")
        yield name, raw.encode(), REFUSED
    for line in ["Host : localhost", " Host: localhost", "Host\t: localhost", "Host: local\0host", "Host: local\rhost",
                 "Host: localhost\r\n evil", "H\0st: localhost"]:
        yield repr(line), got(host=line), BARE
    yield "none in HTTP/1.0", f"GET {ECHO} HTTP/1.0\r\n{MARK}\r\n".encode(), REFUSED
    for host in ["localhost", "LOCALHOST", "LocalHost:8001", "localhost:1", "localhost:65535", "127.0.0.1",
                 "127.0.0.1:80", "[::1]", "[::1]:8001", "  localhost  ", "localhost:00080"]:
        yield f"{host}, which is ours", got(host=f"Host: {host}"), passes("GET")


def header_lines():
    """RFC 9112, section 5."""
    for line in ["X y: z", "X: y\r\n z", "X: y\r\n\tz", ": z", ":", "X", "X\r\nY: z", "X : y", "X\t: y", " X: y",
                 "\tX: y", "X\0: y", "X: a\0b", "X: a\rb", "X: \x01", "X: \x08", "X: \x0b", "X: \x1f", "X: \x7f",
                 "X\x7f: y", "X\x80: y", "X\xff: y", "(X): y", "X,Y: z", "X/Y: z", "X;Y: z", "X=Y: z", "X?Y: z",
                 "X@Y: z", "X[Y]: z", "X\\Y: z", "X{Y}: z", '"X": y', "X<Y>: z", "X: y\r", "X:\r\n\r y"]:
        yield repr(line), got(ECHO, line), BARE
    for line in ["X:", "X: ", "X:y", "X:\ty\t", "X!#$%&'*+-.^_`|~: y", "X: a:b", "X: \xe9", "X: \xff\xfe", "X: a\tb",
                 "X: " + "y" * 8000, "1: 2"]:
        yield f"{line[:20]!r}, which is legal", got(ECHO, line), passes("GET")
    for name in ["LF", "LF behind CRLF"]:
        raw = got(ECHO, "X: y")
        yield f"line ends: {name}", raw.replace(b"\r\n", b"\n") if name == "LF" else raw[:-2] + b"\n", passes("GET")
    yield "101 headers", got(ECHO, *["X: y"] * 101), TOO_LARGE
    yield "a header of 33 KiB", got(ECHO, "X: " + "y" * (33 << 10)), TOO_LARGE
    yield "a name of 33 KiB", got(ECHO, "X" * (33 << 10) + ": y"), TOO_LARGE


def targets():
    """RFC 9112, section 3.2: only Amazon's hosts, only the supported forms; a target that passes is unchanged."""
    for target in ["http://evil.test/", "http://evil.test/sandbox/echo", "https://evil.test",
                   "http://localhost.evil.test/x", "http://advertising-api.amazon.com.evil.test/x",
                   "http://advertising-api.amazon.com:8443/x", "http://u@advertising-api.amazon.com/x",
                   "http://u:p@advertising-api.amazon.com/x", "http://evil.test@advertising-api.amazon.com/x",
                   "http://advertising-api.amazon.com@evil.test/x", "http://advertising-api.amazon.com./x",
                   "http://www.amazon.com/x", "http://amazon.com/x", "http://sellingpartnerapi-na.amazon.com/x",
                   "http://127.0.0.1.evil.test/", "http://2130706433/", "http://127.1/", "http://0/",
                   "http://169.254.169.254/latest/meta-data/", "http://[::ffff:127.0.0.1]/", "http://[fd00::1]/",
                   "ftp://localhost/x", "ws://localhost/x", "wss://advertising-api.amazon.com/x",
                   "gopher://localhost/", "localhost://x/y", "unix://localhost/x", "x://localhost/"]:
        yield target, got(target), WRONG_HOST if target.startswith("http") else REFUSED_KEPT
    for target in ["*", "localhost:80", "evil.test:443", "x"]:
        yield target, got(target), REFUSED_KEPT
    for target in ["sandbox/echo", "?x", "a/b", "/sandbox/echo?\xe9"]:
        yield target, got(target), REFUSED
    for target in ["/api/auth", "/api/auth/", "/api/auth/x", "/api/auth/amazon", "/api/auth/amazon/",
                   "/api/auth/amazon/token", "/api/auth/amazon/login/", "/auth/o2", "/auth/o2/x", "/auth/o2/token/x",
                   "/API/AUTH/AMAZON/STATUS", "/x/../api/auth/amazon/status", "/%61pi/auth/amazon/status",
                   "/api%2fauth/amazon/status", "//api/auth/amazon/status", "/auth/O2/token", "//auth/o2/token"]:
        yield target, got(target), Outcome(404, "not_found", kept=True)
    for target in ["/a//x", "/a/../x", "/a/%2e%2e/x", "/a/a%2fb/x", "/a/a%00/x", "/a/%ff/x", "/a/a%20b/x",
                   "/a/" + "x" * 129 + "/y"]:
        yield target[:40], got(target), REFUSED_KEPT
    yield "an account that is not there", got("/a/nobody/x"), Outcome(404, "unknown_account", kept=True)
    yield "a target over 8 KiB", got("/" + "x" * 8300), Outcome(414, "uri_too_long", kept=True)
    yield "a target over 64 KiB", got("/" + "x" * 70000), Outcome(414, "uri_too_long")
    for target in ["//sandbox//echo", "/sandbox/echo/..", "/sandbox/./echo", "/sandbox/echo/%2e%2e/%2fx",
                   "/sandbox/echo%2f", "/sandbox/echo?a=b?c", "/sandbox/echo?a=/../", "/sandbox/echo;a=b",
                   "/sandbox/echo%00", "/sandbox/echo%0d%0aX:%20y", "/sandbox/echo?q=%0d%0aHost:evil",
                   "/sandbox/echo|x", "/sandbox/echo?{}", "/sandbox/echo?", "/sandbox/%65cho", "/sandbox/echo%",
                   "/sandbox/echo%zz", "/sandbox/echo?a[]=1", "/sandbox/echo?^`", "/sandbox/echo\\x",
                   "/api/authx", "/x/../api/authx", "/auth/o2x"]:
        yield f"{target}, as it is", got(target), passes("GET", target)
    yield "/sandbox/é, as it is", got("/sandbox/\xc3\xa9"), passes("GET", "/sandbox/é")
    for target, leaves in [(f"http://localhost{ECHO}", ECHO), (f"http://LOCALHOST:8001{ECHO}?x", f"{ECHO}?x"),
                           (f"http://advertising-api.amazon.com{ECHO}", ECHO),
                           (f"https://Advertising-API.amazon.com:443{ECHO}", ECHO)]:
        yield f"{target}, which is ours", got(target), passes("GET", leaves)


def connections():
    """Protocol switches, managed headers listed as hop-by-hop, and expectations."""
    for lines in [["Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Key: x", "Sec-WebSocket-Version: 13"],
                  ["Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABkAAQAAP__"],
                  ["Upgrade: TLS/1.0"], ["Connection: authorization, amazon-advertising-api-clientid, host"],
                  ["Connection:"], ["Connection: \x09,,,"], ["Connection: transfer-encoding, content-length"],
                  ["Proxy-Connection: keep-alive"], ["Keep-Alive: timeout=9"], ["TE: trailers, chunked"],
                  ["Trailer: Authorization"]]:
        yield " + ".join(lines), got(ECHO, *lines), passes("GET")
    for lines in [["Connection: close"], ["Connection: x, close"], ["Connection: keep-alive", "Connection: close"],
                  ["connection: CLOSE"]]:
        yield " + ".join(lines), got(ECHO, *lines), passes("GET", kept=False)
    for expect in ["200-ok", "x", "100-continue, x"]:
        yield f"Expect: {expect}", posted("Content-Length: 3", f"Expect: {expect}", body="abc"), passes(body="abc")
    old = f"GET {ECHO} HTTP/1.0"
    yield "HTTP/1.0", posted(line=old), passes("GET", kept=False)
    yield "HTTP/1.0 that keeps on", posted("Connection: keep-alive", line=old), passes("GET")


def browsers():
    """No web page can use the proxy."""
    for line in ["Origin: null", "Origin:", "Origin: https://evil.test", "Origin: http://localhost",
                 "Origin: http://127.0.0.1:8001", "Origin: file://", "origin: x", "Sec-Fetch-Site: cross-site",
                 "Sec-Fetch-Site: same-origin",
                 "Sec-Fetch-Site: none", "Sec-Fetch-Site:", "sec-fetch-site: same-site",
                 "Origin: https://a, https://b"]:
        for method in ["GET", "POST", "OPTIONS"]:
            yield f"{method} {line}", got(ECHO, line, method=method), Outcome(403, "cross_site", kept=True)


def broken_off():
    """The caller disconnects in the middle."""
    whole = posted("Content-Length: 9", body="abc")
    for name, raw in [("a body of 3 of 9", whole), ("a head", whole[: whole.index(b"Content")]), ("a request line",
                                                            b"GET /sand"), ("a chunk",
                                                            posted("Transfer-Encoding: chunked", body="9\r\nabc")),
                      ("a chunk's size", posted("Transfer-Encoding: chunked", body="3\r\nabc\r\n1")),
                      ("the last chunk", posted("Transfer-Encoding: chunked", body="3\r\nabc\r\n0\r\n")),
                      ("the trailers", posted("Transfer-Encoding: chunked", body="3\r\nabc\r\n0\r\nX: y\r\n"))]:
        yield name, raw, NEVER_WHOLE


def catalogue() -> list[Case]:
    groups = [transfer_encodings, content_lengths, chunked_bodies, request_lines, methods, hosts, header_lines,
              targets, connections, browsers, broken_off]
    cases = [Case(group.__name__, *case, ends=group is broken_off) for group in groups for case in group()]
    assert len({(case.group, case.name) for case in cases}) == len(cases), "duplicate case"
    return cases
