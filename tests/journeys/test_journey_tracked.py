"""A search with trackers that is killed again and again: the tools read back every trial exactly once."""

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
from journey import SLOW_NET, SLOWLY, rows, settings, wait_for_rows

pytestmark = [pytest.mark.journey, pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # of what the tools import
SEED = int(os.environ.get("BITFRONT_KILLS_SEED", "0")) or random.SystemRandom().randrange(1, 2**32)
#: Of the search.
CANDIDATES = 36
#: Reads both back in a new process, because trackio reads its environment once.
READ = """
import json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import tracked
folder = Path("runs/slow")
identifier = json.loads((folder / "tracking.json").read_text())["id"]
print(json.dumps([tracked.mlflow_steps(folder, identifier), tracked.trackio_steps(identifier)]))
"""


@pytest.mark.long
def test_three_kills(shell, data):
    for module in ("mlflow", "trackio"):
        pytest.importorskip(module)
    print(f"BITFRONT_KILLS_SEED={SEED}")
    rng, store = random.Random(SEED), shell.folder / "runs/slow/trials.sqlite"
    shell.env["TRACKIO_DIR"] = str(shell.folder / "trackio")
    shell.write("slow_net.py", SLOW_NET)
    options = {"model": "slow_net:net", "project": "slow", "weights": "[2, 3, 4]", "top": "max_steps = 20"}
    shell.write("slow.toml", settings(data, **options))
    search = ("search", "--config", "slow.toml", "--track", "mlflow", "--track", "trackio")
    for _ in range(3):
        before = len(rows(store))
        process = shell.start(*search, **SLOWLY)
        wait_for_rows(store, min(before + rng.randint(1, 6), CANDIDATES - 1), shell, process)
        time.sleep(rng.uniform(0.0, 0.1))
        os.killpg(process.pid, signal.SIGKILL)
        shell.finish(process, code=None)
    typed = shell(*search)
    assert "tracked: mlflow ui --backend-store-uri sqlite:///runs/mlflow.db, experiment bitfront" in typed.err
    assert "tracked: trackio show --project bitfront" in typed.err
    stored = rows(store)
    for trials in json.loads(shell.python(READ, Path(__file__).parents[1])):
        assert [number for number, _ in trials] == [row[0] for row in stored]
        assert [values["objectives/accuracy"] for _, values in trials] == [row[4] for row in stored]
