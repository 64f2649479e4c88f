"""Secrets that are looked for where none may be: in whatever encoding somebody may have written them."""

import base64
import json
import urllib.parse
from pathlib import Path

ENCODINGS = ("plain", "url", "base64", "base64url", "hex", "json")


def encoded(secret: bytes) -> dict[str, list[bytes]]:
    """What to look for, by encoding. Base64 in the middle of a text depends on where it begins: all three ways."""
    text = secret.decode()
    aligned = [base64.b64encode(b"\0" * shift + secret)[4 if shift else 0 : -4] for shift in range(3)]
    return {
        "plain": [secret],
        "url": [urllib.parse.quote(text, safe="").encode(), urllib.parse.quote(text, safe="").lower().encode()],
        "base64": aligned,
        "base64url": [piece.translate(bytes.maketrans(b"+/", b"-_")) for piece in aligned],
        "hex": [secret.hex().encode(), secret.hex().upper().encode()],
        "json": [json.dumps(text)[1:-1].encode(), "".join(f"\\u{ord(char):04x}" for char in text).encode()],
    }


def halves(secret: str) -> list[bytes]:
    """A leak may be cut: either half of a secret is one."""
    middle = len(secret) // 2
    assert middle >= 10, "a half has to be long enough not to stand anywhere by chance"
    return [secret[:middle].encode(), secret[middle:].encode()]


def hits(canaries: dict[str, str], places: dict[str, bytes]) -> list[tuple[str, str, str]]:
    """Canary, encoding and place of each find."""
    found = []
    for name, secret in canaries.items():
        needles = [(encoding, needle) for half in halves(secret) for encoding, all_ in encoded(half).items() for needle in all_]
        for place, content in places.items():
            seen = {encoding for encoding, needle in needles if needle in content}
            found += [(name, encoding, place) for encoding in ENCODINGS if encoding in seen]
    return found


def files(directory: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in directory.rglob("*") if path.is_file()}
