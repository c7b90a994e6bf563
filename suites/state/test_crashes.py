"""Faults while the store is written to: what was acknowledged is there, whole, or nothing is."""

import pytest

from .support import campaign


@pytest.mark.forge_check("state.commit_atomic")
def test_commit_atomic(subject, evidence, forge_profile, forge_seed):
    """A kill at a write-class system call of a commit leaves the old or the new states, whole.

    Calls are enumerated by strace while the store is made, committed to and collected, and struck
    one a trial. The same calls, replayed on a simulated disk, are cut short by a power cut: nothing
    that was not synced survives, or all of it, or a random part in sectors of 512 bytes. What the
    store shows is compared with the bytes that were committed; exact. It must verify and take
    another commit.
    """
    campaign("kill", subject, evidence, profile=forge_profile, seed=forge_seed)
    campaign("replay", subject, evidence, profile=forge_profile, seed=forge_seed)


@pytest.mark.forge_check("state.power_loss")
def test_power_loss(subject, evidence, forge_profile, forge_seed):
    """No commit acknowledged before the power of an ext4 is cut is lost; at least 25 cuts.

    EXT4_IOC_SHUTDOWN without a log flush on a loop device. Acknowledgements read after the cut are
    in doubt and do not count.
    """
    campaign("power_cut", subject, evidence, profile=forge_profile, seed=forge_seed)


@pytest.mark.forge_check("state.io_errors")
def test_io_errors(subject, evidence, forge_profile, forge_seed):
    """EIO, ENOSPC and EINTR at a call lose nothing acknowledged, and no failed sync is believed.

    After a sync that failed, a simulated power cut takes what it did not write: a store that tried
    again, or went on, shows it. Disks and files that are full, at every size, are a second source
    of the same errors.
    """
    campaign("errors", subject, evidence, profile=forge_profile, seed=forge_seed)
    campaign("file_limit", subject, evidence, profile=forge_profile, seed=forge_seed)


@pytest.mark.forge_check("state.concurrent_writers")
def test_concurrent_writers(subject, evidence, forge_profile, forge_seed):
    """Two processes commit at once and are killed: each finds all it was acknowledged.

    No generation is acknowledged to two writers, and none is turned away for the other.
    """
    campaign("writers", subject, evidence, profile=forge_profile, seed=forge_seed)


@pytest.mark.forge_check("state.collection_keeps_live")
def test_collection_keeps_live(subject, evidence, forge_profile, forge_seed):
    """A collection in the middle of a commit, a read or a restore removes nothing that is needed.

    Random schedules at the granularity of file operations; after each, every generation that had to
    be kept is read and compared with what was committed.
    """
    report = campaign("collection", subject, evidence, profile=forge_profile, seed=forge_seed)
    evidence.at_least(
        "collections_made",
        report.details.get("collections made", 0),
        limit=1,
        reason="a schedule in which none ran shows nothing",
    )
