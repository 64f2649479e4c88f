"""Requests whose end parsers may disagree about: generated from a seed, each with a hidden request inside and one
after it.

Every request line and every `X-Request-Id` contains the kind, the number and a checksum, so that a mutated name is
invalid: `m-7-…` the mutated request, `s-7-…` the one hidden in its body or after it, `c-7-…` the good one that
follows.
"""

import random
import zlib

ECHO = "/sandbox/echo"
ODD = [b"\r", b"\n", b"\r\n", b"\0", b" ", b"\t", b"\x0b", b"\x0c", b"\x85", b"\xa0", b"\xff", b";", b":", b",", b"=",
       b'"', b"0", b"1", b"5", b"a", b"-", b"+", b"_", b"x", b"\\", b"/"]
LENGTHS = ["{n}", "{n}", "{n}", "+{n}", "0{n}", "{n} ", " {n}", "{n},{n}", "{n}, {n}", "{n}\t", "0x{h}", "-{n}",
           "{n}.0", "{n};", "{m}", "0", "", "{n}\x0b", "{n}_0", "00000000000000000000{n}", "18446744073709551616",
           "{n} {n}"]
CODINGS = ["chunked", "chunked", "chunked", "Chunked", "CHUNKED", " chunked", "chunked ", "\tchunked", "chunked\t",
           "xchunked", "chunked, chunked", "chunked, identity", "identity, chunked", "gzip, chunked", ",chunked",
           "chunked,", "identity",
           "chunked;q=1", '"chunked"', "\x0bchunked", "chunked\x0b", "cow", "", "chu\tnked", "chunked\0",
           "chunked\xa0", "trailers", "\r\n chunked", "x\r\n chunked"]
NAMES = ["Transfer-Encoding", "transfer-encoding", "TRANSFER-ENCODING", "Transfer-Encoding ", " Transfer-Encoding",
         "Transfer_Encoding", "Transfer-Encoding\t", "Transfer-Encoding\0", "X: y\r\n Transfer-Encoding",
         "X: y\nTransfer-Encoding",
         "X: y\rTransfer-Encoding", "\x0bTransfer-Encoding", "Transfer\xadEncoding", "Transfer.Encoding", "Trailer",
         "Content-Encoding"]
LENGTH_NAMES = ["Content-Length", "content-length", "CONTENT-LENGTH", "Content-Length ", " Content-Length",
                "Content_Length", "Content-Length\t", "Content-Length\0", "X: y\nContent-Length",
                "X: y\rContent-Length", "X: y\r\n Content-Length"]
SIZES = ["{h}", "{h}", "{h}", "{H}", "0{h}", "000000{h}", "0x{h}", "+{h}", "-{h}", "{h} ", " {h}", "{h}\t", "{h};",
         "{h};x", "{h};x=y", '{h};x="y"', "{h};\n", "{h};x\n", "{h}\0", "{h}_", "{h}\x0b", "{h},", "{h}g", "",
         "ffffffffffffffff{h}", "1000000000{h}", "{w}"]
ENDS = ["\r\n"] * 8 + ["\n", "\r", "", "\r\r\n", "\n\r\n", "XX", "X\r\n", "\r\nX", "\0\r\n", " \r\n"]
EXTRA = ["Connection: transfer-encoding", "Connection: content-length", "Connection: close, content-length",
         "Connection: keep-alive", "Expect: 100-continue", "Expect: x", "Upgrade: h2c", "Trailer: Content-Length",
         "TE: trailers", "Host: localhost",
         "Content-Type: application/json", "X-Http-Method-Override: GET", "Keep-Alive: timeout=1",
         "Proxy-Connection: close", "Transfer-Encoding:", "Content-Length:", "X: \xff", ": x", "X", "\tX: y"]


def named(kind: str, number: int) -> str:
    return f"{kind}-{number}-{zlib.crc32(f'{kind}{number}'.encode()):08x}"


def is_name(text: str) -> bool:
    kind, _, rest = text.partition("-")
    number = rest.partition("-")[0]
    return kind in ("m", "s", "c") and number.isdigit() and text == named(kind, int(number))


def call(kind: str, number: int, method: str = "GET", *lines: str) -> str:
    head = [f"{method} {ECHO}?{named(kind, number)} HTTP/1.1", "Host: localhost",
            f"X-Request-Id: {named(kind, number)}", *lines]
    return "\r\n".join([*head, "", ""])


def mutated(number: int, chance: random.Random) -> bytes:
    """The mutated request, without the good one after it."""
    hidden = call("s", number)
    content = chance.choice(["abcde", hidden, "0\r\n\r\n" + hidden, "abc\r\n" + hidden, "0\r\n\r\n", ""])
    method = chance.choice(["POST", "POST", "POST", "PUT", "GET", "DELETE", "HEAD", "OPTIONS", "PATCH"])
    version = chance.choice(["HTTP/1.1"] * 40 + ["HTTP/1.0", "HTTP/1.1 ", "HTTP/1.2", "http/1.1"])
    lines = []
    chunked = chance.random() < 0.65
    body = chunks(content, hidden, chance) if chunked else content
    if chunked:
        name = chance.choice(NAMES) if chance.random() < 0.12 else "Transfer-Encoding"
        blank = chance.choice(["", " ", " ", " ", "  "])
        coding = chance.choice(CODINGS) if chance.random() < 0.15 else "chunked"
        lines.append(f"{name}:{blank}{coding}")
        if chance.random() < 0.06:
            lines.append(f"{chance.choice(NAMES[:3])}: {chance.choice(CODINGS)}")
    if not chunked or chance.random() < 0.3:
        n = len(body.encode("latin-1", "replace"))
        for _ in range(2 if chance.random() < 0.1 else 1):
            size = chance.choice([n, n, n, max(n - 1, 0), n + 1, 0, 5, n // 2]) if chance.random() < 0.5 else n
            spelled = chance.choice(LENGTHS) if chance.random() < 0.15 else "{n}"
            name = chance.choice(LENGTH_NAMES) if chance.random() < 0.12 else "Content-Length"
            lines.append(f"{name}: {spelled.format(n=size, h=f'{size:x}', m=chance.randrange(99))}")
    for _ in range(chance.choice([0, 0, 0, 1, 1])):
        lines.append(chance.choice(EXTRA))
    chance.shuffle(lines)
    end = chance.choice(["\r\n"] * 30 + ["\n", "\n", "\r\r\n"])
    head = [f"{method} {ECHO}?{named('m', number)} {version}", "Host: localhost",
            f"X-Request-Id: {named('m', number)}", *lines, "", ""]
    raw = bytearray((end.join(head) + body).encode("latin-1", "replace"))
    # After the request line, which identifies the request.
    start = raw.index(b"Host:")
    if chance.random() < 0.2:
        for _ in range(chance.choice([1, 1, 1, 2, 3])):
            at = chance.randrange(start, len(raw))
            cut = chance.choice([0, 0, 1, 2])
            raw[at : at + cut] = chance.choice(ODD) if chance.random() < 0.8 else b""
    if chance.random() < 0.1:
        raw += hidden.encode()
    return bytes(raw)


def chunks(content: str, hidden: str, chance: random.Random) -> str:
    """`content` in chunks, possibly with one that parsers read differently."""
    pieces = [content] if chance.random() < 0.6 or len(content) < 2 else [content[: len(content) // 2],
                                                            content[len(content) // 2 :]]
    odd = chance.random() < 0.5
    if odd and chance.random() < 0.15:
        # Two bytes after the data that are no line end: one parser skips them, another skips the line.
        inner = "0\r\n\r\n" + hidden
        return f"5\r\nabcdeXX2\r\n{len(inner):02x}\r\n{inner}\r\n0\r\n\r\n"
    body = ""
    for piece in pieces:
        if not piece:
            continue
        size, wrong = len(piece), max(len(piece) + chance.choice([-2, -1, 1, 2]), 0)
        spelled = chance.choice(SIZES) if odd and chance.random() < 0.4 else "{h}"
        after_size, after_data = (chance.choice(ENDS) if odd and chance.random() < 0.25 else "\r\n" for _ in range(2))
        body += spelled.format(h=f"{size:x}", H=f"{size:X}", w=f"{wrong:x}") + after_size + piece + after_data
    last = chance.choice(["0\r\n\r\n"] * 8 + ["0\n\n", "00\r\n\r\n", "0;x\r\n\r\n", "0\r\nX: y\r\n\r\n",
                                              "0\r\nContent-Length: 9\r\n\r\n", "0\r\nTransfer-Encoding: x\r\n\r\n",
                                              "0\r\n", "0 \r\n\r\n", "-0\r\n\r\n", "", "0\r\nX y\r\n\r\n",
                                              "0\r\n X: y\r\n\r\n"])
    return body + (last if odd else "0\r\n\r\n")
