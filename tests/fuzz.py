"""Draws other examples than the suite does, from random seeds, until the time is up: ``make fuzz``.

Every round runs all property tests with another seed, and prints it first. A round that fails is the last one, and says
how to draw the same examples again: where a seed is given there is one round, with that seed.

``python tests/fuzz.py --seconds 600 -- -k front`` hands what follows ``--`` to pytest.
"""

import argparse
import os
import secrets
import subprocess
import sys
import time
from pathlib import Path

#: What pytest says where no test is chosen.
NOTHING = 5


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--seconds", type=float, default=600, help="begin no round after them, and end the one that runs"
    )
    parser.add_argument("--rounds", type=int, help="at most so many")
    parser.add_argument("--seed", type=int, help="of the only round")
    parser.add_argument("pytest", nargs="*", help="further arguments for pytest")
    given = parser.parse_args()
    tests = str(Path(__file__).parent)
    # Whoever names tests gets those.
    where = [] if any(Path(word.split("::")[0]).exists() for word in given.pytest) else [tests]
    end = time.monotonic() + given.seconds
    rounds, most = 0, given.rounds if given.seed is None else 1
    while (left := end - time.monotonic()) > 0 and rounds != most:
        rounds += 1
        seed = secrets.randbelow(2**32) if given.seed is None else given.seed
        print(f"round {rounds}: seed {seed}, {left:.0f} s left", flush=True)
        command = [sys.executable, "-m", "pytest", "-q", "-m", "hypothesis", f"--hypothesis-seed={seed}"]
        environment = {**os.environ, "BITFRONT_PROPERTIES": "fuzz"}
        process = subprocess.Popen([*command, *where, *given.pytest], env=environment)
        try:
            code = process.wait(left)
        except subprocess.TimeoutExpired:
            process.terminate()
            process.wait()
            print(f"the time is up in round {rounds}; nothing failed")
            return 0
        except KeyboardInterrupt:
            process.wait()
            return 130
        if code:
            print(f"failed with seed {seed}. The same examples again: make fuzz SEED={seed}", flush=True)
            return code if code != NOTHING else 2
    print(f"nothing failed in {rounds} round{'s' if rounds > 1 else ''}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
