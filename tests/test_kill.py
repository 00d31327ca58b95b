"""Work that is killed, interrupted, or out of room at any moment: files are whole, and a resume gives the same bytes.

`PYTHONPATH=. python tests/test_kill.py 50` kills each kind of work so often.
"""

import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from random import Random

import pytest
import torch
from tqdm import tqdm

import ib_analysis as ib
from ib_analysis.experiments.demo import run
from tests.conftest import random_llama

REFUSED = 3  # a status that says: refused with an error that names the file
MODEL = random_llama()
PROMPTS = list(torch.randint(3, 64, (15, 96), generator=torch.Generator().manual_seed(0)))


def allocation(folder):
    found = ib.optimal_allocation(MODEL, 1 / 4, prompts=PROMPTS, profile_path=folder / "profile.safetensors")
    found.to_json(folder / "allocation.json")
    found.plot(folder / "allocation")


def plane(folder):
    found = ib.information_plane(MODEL, prompts=PROMPTS, shares=(1 / 2, 1 / 4), profile_path=folder / "profile.safetensors")
    found.plot(folder / "plane")


def demo(folder):
    run(folder, calibrating=6, held_out=6)


WORK = {"allocation": allocation, "plane": plane, "demo": demo}


def begun(name, folder, largest_bytes=None):
    """The process id of a child that does the work. With `largest_bytes` no file may be larger: the disk is full there."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        warnings.simplefilter("ignore")
        with open(os.devnull, "w", encoding="utf-8") as nowhere:
            os.dup2(nowhere.fileno(), 1)
            os.dup2(nowhere.fileno(), 2)
        torch.set_num_threads(1)
        if largest_bytes is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest_bytes, largest_bytes))
        WORK[name](folder)
        status = 0
    except OSError as error:
        status = REFUSED if str(folder) in str(error) and "not written" in str(error) else 1
    except KeyboardInterrupt:
        status = 130
    finally:
        os._exit(status)


def ended(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.endswith(".partial")}


class Work:
    """One kind of work, what it writes if nothing happens, and how long it takes."""

    def __init__(self, name, folder):
        self.name, self.folder = name, folder
        begin = time.monotonic()
        whole = self.place("whole")
        assert ended(begun(name, whole)) == 0
        self.seconds, self.expected = time.monotonic() - begin, contents(whole)

    def place(self, name):
        place = self.folder / f"{self.name} {name}"
        place.mkdir()
        return place

    def resumed(self, place):
        """What is there is read or written again, and is then what it would have been."""
        for path in place.glob("*.safetensors"):
            ib.Profile.load(path)
        for path in place.glob("*.json"):
            ib.Allocation.from_json(path)
        assert ended(begun(self.name, place)) == 0
        assert contents(place) == self.expected

    def signalled(self, number, signals, statuses):
        """Gets signals at a random moment each, one process after the other, and is resumed."""
        rng, place = Random(number), self.place(f"{signals[0].name} {number}")
        for one in signals:
            child = begun(self.name, place)
            time.sleep(rng.uniform(0, self.seconds))
            os.kill(child, one)
            assert ended(child) in statuses
        self.resumed(place)

    def out_of_room(self, number, largest_bytes):
        place = self.place(f"room {number}")
        assert ended(begun(self.name, place, largest_bytes)) == REFUSED
        assert not list(place.glob(".*"))
        self.resumed(place)

    def together(self, number, count=3):
        """Processes that share a folder."""
        place = self.place(f"together {number}")
        assert [ended(child) for child in [begun(self.name, place) for _ in range(count)]] == [0] * count
        assert contents(place) == self.expected and not list(place.glob(".*"))


def try_all(name, folder, count, show=False):
    work = Work(name, folder)
    for number in tqdm(range(count), desc=f"{name}, kill -9", disable=not show):
        work.signalled(number, [signal.SIGKILL] * (1 + number % 2), (-signal.SIGKILL, 0))
    for number in tqdm(range(count // 2), desc="Ctrl-C", disable=not show):
        work.signalled(number, [signal.SIGINT], (130, 0))
    sizes = sorted({0, *map(len, work.expected.values())})
    limits = [size - 1 for size in sizes[1:]] if count > 2 else [sizes[-1] - 1]  # each time one file more is written
    for number, limit in enumerate(tqdm(limits, desc="disk full", disable=not show)):
        work.out_of_room(number, limit)
    for number in range(count // 10):
        work.together(number)
    return work.seconds


@pytest.mark.slow
def test_killed_work_goes_on_to_the_same_bytes():
    """In a process of its own, which forks before it computes."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(["."] + sys.path)}
    command = [sys.executable, __file__, "1", "allocation"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[1], timeout=300)
    assert done.returncode == 0, done.stderr


if __name__ == "__main__":
    for kind in sys.argv[2:] or WORK:
        with tempfile.TemporaryDirectory() as folder_name:
            taken = try_all(kind, Path(folder_name), int(sys.argv[1]), show=int(sys.argv[1]) > 2)
        print(f"{kind}: {taken:.1f} s if left alone", flush=True)
