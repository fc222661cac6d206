"""How long OpenMP's threads spin before they sleep.

torch computes in a team of OpenMP threads that wait for each other after every operation, hundreds of times a step. In
GNU's runtime a thread that waits spins 300,000 times, for some ten milliseconds, so that it is ready at once. Beside
another busy process that is harmful: the threads spin on the cores that the ones they wait for need.
"""

import os
import sys

VARIABLES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")  # GNU's runtime reads both when torch is imported
SPINS = 25_000  # docs/decisions.md has what other numbers give


def limit_spinning(spins: int = SPINS) -> bool:
    """Make waiting threads of this process sleep after a few spins; return whether they will.

    Call it before torch is imported; the `loradeck` command does. It sets the environment variable $GOMP_SPINCOUNT, and
    does nothing if that or $OMP_WAIT_POLICY is set, or if torch is imported already.
    """
    if "torch" in sys.modules or any(name in os.environ for name in VARIABLES):
        return False
    os.environ["GOMP_SPINCOUNT"] = str(spins)
    return True
