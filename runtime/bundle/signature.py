"""Signed bundles: an Ed25519 signature of manifest.json, which names the hash of every other file.

`manifest.sig` holds the signature and the public key that it was made with. That key proves
nothing by itself, since anyone can sign; a bundle is trusted where the key is the required one.
Keys are PEM files as openssl writes them (PKCS 8 without a password, and SPKI).
"""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.bundle.reading import broken, read_small
from runtime.files.checked_json import parse_json
from runtime.files.extras import need

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

FILE = "manifest.sig"
CONTEXT = b"d2m bundle manifest, format 1\0"  # signed with it, so that no other text fits
MAX_BYTES = 64 << 10  # of a key or a signature


def check_signature(root: Path, digest: str, key: str | os.PathLike[str] | None) -> str:
    """The fingerprint of the key that signed the manifest of `digest`; ValueError for a wrong one.

    `key`: the public key's file that must have; None: whichever key the signature names.
    """
    ed25519, serialization = library()
    wanted = None
    if key is not None:
        found = load(key, serialization.load_pem_public_key, ed25519.Ed25519PublicKey, "a public")
        wanted = raw(found)
    if not os.path.lexists(root / FILE):
        raise broken(root, f"it is not signed (it has no {FILE}), and a signature is required")
    data = read_small(root, "manifest.json")
    if hashlib.sha256(data).hexdigest() != digest:
        raise broken(root, "its manifest.json changed while it was checked")
    named, signature = read_signature(root)
    if wanted is not None and named != wanted:
        raise broken(
            root,
            f"it is signed by key {fingerprint(named)}, expected {fingerprint(wanted)}, which is"
            f" {key}",
        )
    from cryptography.exceptions import InvalidSignature

    if is_small(named):
        raise broken(root, f"its {FILE} names a key with which anyone can sign")
    try:
        ed25519.Ed25519PublicKey.from_public_bytes(named).verify(signature, CONTEXT + data)
    except InvalidSignature:
        raise broken(root, f"its {FILE} is no signature of its manifest.json") from None
    return fingerprint(named)


def is_small(key: bytes) -> bool:
    """Whether a public key is a point of an order of at most 8, or of no curve.

    Signatures of such a key fit many texts and need no private key; OpenSSL takes them.

    Three doublings lead to the neutral point (0, 1); a point's y and x^2 are enough for them
    (derived from the addition law of RFC 8032, section 5.1.4).
    """
    p = 2**255 - 19
    d = -121665 * pow(121666, -1, p) % p
    y = (int.from_bytes(key, "little") & (1 << 255) - 1) % p
    square = (y * y - 1) * pow(d * y * y + 1, -1, p) % p
    for _ in range(3):
        cross = d * square * y * y
        if (cross * cross - 1) % p == 0:  # of no point of the curve
            return True
        square, y = (
            4 * square * y * y * pow(1 + cross, -2, p) % p,
            (y * y + square) * pow(1 - cross, -1, p) % p,
        )
    return y == 1 and square == 0


def read_signature(root: Path) -> tuple[bytes, bytes]:
    """The key (32 bytes) and the signature (64) in manifest.sig."""
    try:
        row = parse_json(read_small(root, FILE, MAX_BYTES))
    except ValueError as error:
        raise broken(root, f"its {FILE} is no signature ({error})") from None
    row = row if isinstance(row, dict) else {}
    fields = [row.get(name) for name in ("key", "signature")]
    fits = [
        isinstance(text, str) and re.fullmatch(f"[0-9a-f]{{{length}}}", text)
        for text, length in zip(fields, (64, 128))
    ]
    if row.get("algorithm") != "ed25519" or not all(fits):
        raise broken(root, f"its {FILE} has no Ed25519 signature of today's form")
    named, signature = (bytes.fromhex(str(text)) for text in fields)
    return named, signature


def load(path: str | os.PathLike[str], read: Any, kind: type, what: str) -> Any:
    """A key from a PEM file; FileNotFoundError or ValueError names the file."""
    path = Path(path)
    cure = "make a pair with: d2m keygen KEY"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is no file, expected {what} key; {cure}")
    with open(path, "rb") as file:
        data = file.read(MAX_BYTES)
    try:
        key = read(data, password=None) if what == "a private" else read(data)
    except Exception as error:  # ValueError, TypeError (a password), its own UnsupportedAlgorithm
        reason = " ".join(str(error).split())[:80]
        raise ValueError(f"{path} is not {what} key in PEM form ({reason}); {cure}") from None
    if not isinstance(key, kind):
        raise ValueError(f"{path} is not {what} key of Ed25519; {cure}")
    return key


def raw(key: Ed25519PublicKey) -> bytes:
    """A public key's 32 bytes."""
    _, serialization = library()
    form = serialization.PublicFormat.Raw
    data: bytes = key.public_bytes(serialization.Encoding.Raw, form)
    return data


def fingerprint(public: bytes) -> str:
    """The first half of a public key's SHA-256: what people compare."""
    return hashlib.sha256(public).hexdigest()[:32]


def library() -> tuple[Any, Any]:
    """cryptography's modules; ImportError names the extra."""
    try:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError as error:
        raise ImportError(need("sign", "signatures need cryptography", error)) from None
    return ed25519, serialization
