"""Compiles the extension ahead of time.

  python -m csrc            # prints the folder, seconds and instruction set; the last line is JSON
  python -m csrc --clean    # and removes the builds of other versions
"""
import argparse
import json
import os
import re
import shutil
import sys
import time

import csrc

BUILD = r"\.?resnet50-[0-9a-f]{16}-[0-9a-f]{8}-(cpu|[0-9a-f]{8})(\.\d+\.tmp)?"


def clean(folder, keep):
    """Removes this extension's other builds from the folder, and what killed ones left. -> how many"""
    with csrc.locked(folder):
        stale = [name for name in os.listdir(folder) if name != keep
                 and re.fullmatch(BUILD, name)]  # others may use the folder
        for name in stale:
            shutil.rmtree(os.path.join(folder, name), ignore_errors=True)
    return len(stale)


def main(args):
    os.environ["RESNET50_EXT"] = os.environ.get("RESNET50_EXT") or "require"
    if os.environ["RESNET50_EXT"] == "off":
        sys.exit("csrc: error: RESNET50_EXT=off: asks for no build")
    start = time.perf_counter()
    try:
        if not csrc.load():
            sys.exit(1)  # it has said why
        folder = os.path.dirname(csrc.build())
        result = dict(folder=folder, seconds=round(time.perf_counter() - start, 2), isa=csrc.isa(),
                      cuda=csrc.has_cuda())
        if args.clean:
            result["removed"] = clean(*os.path.split(folder))
    except (RuntimeError, OSError) as error:
        sys.exit(f"csrc: error: {error}")
    print(json.dumps(result))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m csrc", description="Compiles the extension ahead of time.")
    parser.add_argument("--clean", action="store_true", help="remove the builds of other versions")
    main(parser.parse_args())
