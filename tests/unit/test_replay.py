"""The replay buffer: what is flushed stays, what is torn goes, domains stay bounded and balanced."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slipstream.learning.replay import Kept, ReplayBuffer
from slipstream.records import observation_id
from tests.observed import observation

ROOT = Path(__file__).parents[2]


def kept(number: int, *, domain: str = "count") -> Kept:
    return Kept(0, number, observation(f"request-{number}", domain=domain))


def offsets(buffer: ReplayBuffer) -> list[int]:
    return [one.offset for one in buffer.kept()]


def test_flushed_observations_survive_reopening_in_their_order(tmp_path: Path) -> None:
    buffer = ReplayBuffer(tmp_path, max_per_domain=8)
    written = [kept(number) for number in (3, 1, 2)]
    assert all(buffer.append(one) for one in written)
    buffer.flush()
    assert list(ReplayBuffer(tmp_path, max_per_domain=8).kept()) == written


def test_a_known_observation_is_not_kept_twice(tmp_path: Path) -> None:
    buffer = ReplayBuffer(tmp_path, max_per_domain=8)
    assert buffer.append(kept(1))
    assert not buffer.append(Kept(3, 77, observation("request-1")))
    assert offsets(buffer) == [1]


def test_an_evicted_observation_is_still_recognised_after_reopening(tmp_path: Path) -> None:
    buffer = ReplayBuffer(tmp_path, max_per_domain=2)
    for number in range(5):
        buffer.append(kept(number))
    buffer.settle({0: 5})
    assert offsets(buffer) == [3, 4]
    reopened = ReplayBuffer(tmp_path, max_per_domain=2)
    assert offsets(reopened) == [3, 4]
    assert not reopened.append(kept(0))


def test_an_unsettled_observation_is_never_evicted(tmp_path: Path) -> None:
    buffer = ReplayBuffer(tmp_path, max_per_domain=2)
    for number in range(6):
        buffer.append(kept(number))
    buffer.settle({0: 3, 1: 100})
    assert offsets(buffer) == [3, 4, 5]


def test_what_another_log_gave_stays_and_may_be_evicted_whatever_its_offsets_were(tmp_path: Path) -> None:
    buffer = ReplayBuffer(tmp_path, max_per_domain=3)
    buffer.adopt("redis 1")
    for number in range(100, 103):
        buffer.append(kept(number))
    buffer.adopt("redis 1")
    assert offsets(buffer) == [100, 101, 102]
    buffer.adopt("redis 2")
    reopened = ReplayBuffer(tmp_path, max_per_domain=3)
    reopened.adopt("redis 2")
    assert [one.observation.request_id for one in reopened.kept()] == ["request-100", "request-101", "request-102"]
    assert not reopened.append(kept(100))
    for number in (1, 2):
        reopened.append(kept(number))
    reopened.settle({0: 3})
    assert [one.observation.request_id for one in reopened.kept()] == ["request-102", "request-1", "request-2"]


def test_compaction_bounds_the_file(tmp_path: Path) -> None:
    path = tmp_path / "observations.frames"
    buffer = ReplayBuffer(tmp_path, max_per_domain=4)
    buffer.append(kept(0))
    buffer.flush()
    one_frame = path.stat().st_size
    for number in range(1, 200):
        buffer.append(kept(number))
        buffer.settle({0: number + 1})
    # Four kept, a few more dead ones, and the remembered ids: some 20 bytes each.
    assert path.stat().st_size < 16 * one_frame + 200 * 40
    assert offsets(ReplayBuffer(tmp_path, max_per_domain=4)) == offsets(buffer) == [196, 197, 198, 199]


@given(num_cut=st.integers(min_value=1, max_value=10_000), garbage=st.binary(max_size=40))
def test_a_torn_tail_is_cut_and_what_stands_before_it_stays(
    tmp_path_factory: pytest.TempPathFactory, num_cut: int, garbage: bytes
) -> None:
    directory = tmp_path_factory.mktemp("torn")
    buffer = ReplayBuffer(directory, max_per_domain=8)
    ends = []
    for number in range(5):
        buffer.append(kept(number))
        buffer.flush()
        ends.append(next(directory.iterdir()).stat().st_size)
    path = next(directory.iterdir())
    length = max(0, ends[-1] - num_cut)
    path.write_bytes(path.read_bytes()[:length] + garbage)
    survivors = [number for number, end in enumerate(ends) if end <= length]
    reopened = ReplayBuffer(directory, max_per_domain=8)
    assert offsets(reopened) == survivors
    reopened.append(kept(9))
    reopened.flush()
    assert offsets(ReplayBuffer(directory, max_per_domain=8)) == [*survivors, 9]


@pytest.mark.processes
def test_what_was_flushed_survives_kill_9(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from slipstream.learning.replay import Kept, ReplayBuffer\n"
        "from tests.observed import observation\n"
        "buffer = ReplayBuffer(Path(sys.argv[1]), max_per_domain=10**6)\n"
        "for number in range(10**6):\n"
        "    buffer.append(Kept(0, number, observation(f'request-{number}'))); buffer.flush()\n"
        "    print(number, flush=True)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as process:
        assert process.stdout is not None
        flushed = [int(process.stdout.readline()) for _ in range(20)]
        os.kill(process.pid, signal.SIGKILL)
        flushed += [int(line) for line in process.stdout if line.endswith("\n")]
    assert offsets(ReplayBuffer(tmp_path, max_per_domain=10**6))[: len(flushed)] == flushed


def test_a_failed_write_leaves_the_file_whole_and_can_be_repeated(tmp_path: Path) -> None:
    buffer = ReplayBuffer(tmp_path, max_per_domain=8)
    buffer.append(kept(1))
    buffer.flush()
    buffer.append(kept(2))
    file, buffer._file = buffer._file, os.open(os.devnull, os.O_RDONLY)
    with pytest.raises(OSError):
        buffer.flush()
    buffer._file = file
    buffer.flush()
    assert offsets(ReplayBuffer(tmp_path, max_per_domain=8)) == [1, 2]


def test_a_batch_mixes_the_newest_with_older_ones_balanced_over_domains(tmp_path: Path) -> None:
    buffer = ReplayBuffer(tmp_path, max_per_domain=1000)
    for number in range(100):
        buffer.append(kept(number, domain="rare" if number < 5 else "common"))
    for number in range(100, 120):
        buffer.append(kept(number, domain="newest"))
    chance = random.Random(0)
    drawn = [one for _ in range(500) for one in buffer.sample(8, num_fresh=20, replay_ratio=0.5, chance=chance)]
    shares = {domain: number / len(drawn) for domain, number in Counter(one.domain for one in drawn).items()}
    assert shares["newest"] == 0.5
    assert shares["rare"] == pytest.approx(0.25, abs=0.03)
    one_batch = buffer.sample(8, num_fresh=20, replay_ratio=0.0, chance=chance)
    assert len({observation_id(one) for one in one_batch}) == 8


def test_names_that_came_once_do_not_keep_the_place_of_a_domain_that_comes_again(tmp_path: Path) -> None:
    buffer = ReplayBuffer(tmp_path, max_per_domain=8)
    for number in range(40):
        buffer.append(kept(number, domain=f"once-{number}"))
    for number in range(40, 60):
        buffer.append(kept(number, domain="math" if number % 2 else f"once-{number}"))
    assert "math" in buffer.domains()
    assert [one.request_id for one in buffer.newest(2, domain="math")] == ["request-57", "request-59"]
    assert buffer.domain_of(observation("any", domain="once-0")) == "other"
    others = [int(one.request_id.removeprefix("request-")) for one in buffer.newest(100, domain="other")]
    assert others == sorted(others)
    buffer.flush()
    assert ReplayBuffer(tmp_path, max_per_domain=8).domains() == buffer.domains()


def test_a_domain_that_returns_takes_its_observations_back_from_the_others(tmp_path: Path) -> None:
    buffer = ReplayBuffer(tmp_path, max_per_domain=8)
    for number in range(5):
        buffer.append(kept(number, domain="math"))
    for number in range(5, 30):
        buffer.append(kept(number, domain=f"once-{number}"))
    assert "math" not in buffer.domains()
    buffer.append(kept(30, domain="math"))
    assert len(buffer.newest(100, domain="math")) == 6
    buffer.settle({0: 31})
    assert len(buffer.domains()) == 16


def test_an_unbounded_number_of_domains_shares_a_bounded_number_of_places(tmp_path: Path) -> None:
    buffer = ReplayBuffer(tmp_path, max_per_domain=3)
    for number in range(400):
        buffer.append(kept(number, domain=f"domain-{number}"))
    buffer.settle({0: 400})
    assert len(buffer.domains()) == 16
    assert "other" in buffer.domains()
    assert len(buffer) <= 16 * 3
