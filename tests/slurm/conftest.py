"""These tests are skipped without root or SLURM, unless MOEPRUNE_REQUIRE_SLURM=1 says that both must be there."""

import os
import subprocess
from collections.abc import Iterator

import pytest
from live_cluster import CPUS, SCRIPTS, Cluster, what_is_missing


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A private SLURM of two emulated nodes, started in a second by ``slurm/cluster/up``."""
    missing = what_is_missing()
    if missing:
        reason = f"a SLURM of one's own needs {missing}; see slurm/README.md"
        if os.environ.get("MOEPRUNE_REQUIRE_SLURM") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    up = subprocess.run([SCRIPTS / "up", f"--cpus={CPUS}"], check=True, stdout=subprocess.PIPE, text=True)
    exported = dict(line.removeprefix("export ").split("=", 1) for line in up.stdout.splitlines())
    path = exported.pop("PATH").replace("$PATH", os.environ["PATH"])
    environment = {**os.environ, **exported, "PATH": path, "OMP_NUM_THREADS": "1"}
    try:
        yield Cluster(environment)
    finally:
        subprocess.run([SCRIPTS / "down"], env=environment, check=True)
