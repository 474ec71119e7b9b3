"""Get the emoji world's pictures, or say where they are: `python -m calib.emoji`."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path

from calib.emoji.art import PACKAGE, VERSION, default_folder, get, unpack
from calib.emoji.world import World


def main(argv: list[str] | None = None) -> None:
    """Fetch or unpack where asked, then print the folder and what the world has of it.

    One sentence and exit code 1 where that fails.
    """
    parser = argparse.ArgumentParser(prog="python -m calib.emoji", description=__doc__)
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--get", action="store_true", help=f"npm pack {PACKAGE}@{VERSION}, 74 MB")
    how.add_argument("--tgz", type=Path, help="the package's file, fetched elsewhere")
    parser.add_argument(
        "--folder", type=Path, help="where the pictures lie ($D2M_EMOJI, or cached)"
    )
    args = parser.parse_args(argv)
    folder = args.folder or default_folder()
    try:
        if args.get:
            get(folder)
        elif args.tgz:
            unpack(args.tgz, folder)
        emoji = World(folder=folder).catalogue.emoji
    except (OSError, RuntimeError, ValueError) as error:
        sys.exit(f"error: {error}")
    print(f"{folder}: {len(emoji)} emoji")
    for category, count in Counter(one.category for one in emoji).most_common():
        print(f"{count:5d} {category}")


if __name__ == "__main__":
    main()
