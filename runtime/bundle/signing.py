"""Signing bundles: pairs of keys made, manifests signed, and all of a bundle verified anew."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from runtime.bundle.directory import open_bundle
from runtime.bundle.reading import broken, read_small
from runtime.bundle.signature import CONTEXT, FILE, check_signature, fingerprint, library, load, raw
from runtime.files.atomic import write_bytes


def make_key(path: str | os.PathLike[str]) -> dict[str, str]:
    """Write a new private key to `path`, readable by its owner alone, the public one to PATH.pub.

    Returns private, public (paths) and fingerprint. FileExistsError where either is there.
    """
    ed25519, serialization = library()
    path = Path(path)
    public = path.with_name(path.name + ".pub")
    for each in (path, public):
        if os.path.lexists(each):
            raise FileExistsError(f"{each} exists, expected a new name for a key; choose another.")
    key = ed25519.Ed25519PrivateKey.generate()
    encoding, secret = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    text = key.private_bytes(encoding, secret, serialization.NoEncryption())
    spki = serialization.PublicFormat.SubjectPublicKeyInfo
    path.parent.mkdir(parents=True, exist_ok=True)
    write_new(path, text, 0o600)
    write_new(public, key.public_key().public_bytes(encoding, spki), 0o644)
    return {
        "private": str(path),
        "public": str(public),
        "fingerprint": fingerprint(raw(key.public_key())),
    }


def sign(bundle: str | os.PathLike[str], key: str | os.PathLike[str]) -> dict[str, str]:
    """Check every file of a bundle, then sign its manifest; returns bundle, digest, fingerprint."""
    ed25519, serialization = library()
    private = load(key, serialization.load_pem_private_key, ed25519.Ed25519PrivateKey, "a private")
    opened = open_bundle(bundle, check="full", controlnet=None)
    data = read_small(opened.path, "manifest.json")
    if hashlib.sha256(data).hexdigest() != opened.digest:
        raise broken(opened.path, "its manifest.json changed while it was checked")
    public = raw(private.public_key())
    row = {
        "algorithm": "ed25519",
        "key": public.hex(),
        "signature": private.sign(CONTEXT + data).hex(),
    }
    text = json.dumps(row, indent=2, sort_keys=True) + "\n"
    write_bytes(opened.path / FILE, text.encode(), 0o644)
    return {"bundle": str(opened.path), "digest": opened.digest, "fingerprint": fingerprint(public)}


def verify(
    bundle: str | os.PathLike[str], key: str | os.PathLike[str] | None = None
) -> dict[str, Any]:
    """Every hash of a bundle computed anew, and its signature: bundle, digest, files, signed_by.

    With `key` (a public key's file) the signature must be of that key. Without, a signature that
    is there must be right; `signed_by` is its key's fingerprint, or None. Raises ValueError.
    """
    opened = open_bundle(bundle, check="full", controlnet=None)
    signed = (opened.path / FILE).exists()
    by = check_signature(opened.path, opened.digest, key) if key is not None or signed else None
    return {
        "bundle": str(opened.path),
        "digest": opened.digest,
        "files": len(opened.manifest["files"]),
        "signed_by": by,
        "key_asked_for": key is not None,
    }


def write_new(path: Path, data: bytes, mode: int) -> None:
    """Write a file that must not be there yet, with these rights from the beginning."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with open(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
