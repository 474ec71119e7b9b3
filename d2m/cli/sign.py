"""d2m keygen, d2m sign and d2m verify: by whom a bundle was made, and whether it is whole."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from d2m.cli import options
from d2m.cli.options import option
from d2m.cli.terminal import print_answer


def keygen(
    path: Annotated[
        Path, typer.Argument(metavar="KEY", help="File to write; the public key goes to KEY.pub.")
    ],
    json_: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Make a pair of Ed25519 keys to sign bundles with.

    KEY stays secret, KEY.pub is for those who check.
    """
    from runtime.bundle.signing import make_key

    print_answer(make_key(path), json_)


def sign(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="Bundle to sign.")],
    key: Annotated[Path, option("Private key, made with d2m keygen.")],
    json_: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Check every file of BUNDLE and sign its manifest.

    The manifest holds the hashes of all files.
    """
    from runtime.bundle.signing import sign as function

    print_answer(function(bundle, key), json_)


def verify(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="Bundle to check.")],
    key: options.PublicKey = None,
    json_: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Hash every file of BUNDLE again and check its signature."""
    from runtime.bundle.signing import verify as function

    print_answer(function(bundle, key), json_)
