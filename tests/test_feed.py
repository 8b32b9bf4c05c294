"""The images of a step, wherever the data lie: the same batch, gathered ahead of the step."""

import re
import resource
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cdm_fast.data import batch_indices, load_data
from cdm_fast.data.copies import map_file
from cdm_fast.training.feed import HostFeed, images_of, on_device
from cdm_fast.training.state import new_state
from cdm_fast.training.step import draw_batch
from tests.tiny_run import tiny_config, write_images

CPU = torch.device("cpu")


@pytest.fixture
def data(tmp_path):
    return load_data(write_images(tmp_path / "a.npz"))


def test_a_batch_is_bitwise_the_same_through_the_feed(tmp_path, data):
    config = tiny_config(tmp_path / "a.npz")
    model = new_state(config, CPU).model
    fed = replace(data, feed=HostFeed(data.images, pin=False))
    for step in (0, 1, 2, 7, 3, 3):  # in a row, with a jump, back, and again as a replay does
        plain, through = (draw_batch(each, model, config, step) for each in (data, fed))
        for one, other in zip(plain, through, strict=True):
            assert one is other is None or torch.equal(one, other)


def test_the_next_steps_images_are_gathered_ahead_and_by_a_thread(data, monkeypatch):
    feed, gathered = HostFeed(data.images, pin=False), []
    gather = feed._gather

    def watched(index):
        gathered.append(index.tolist())
        return gather(index)

    monkeypatch.setattr(feed, "_gather", watched)
    steps = [batch_indices(len(data), 8, 0, step) for step in range(4)]
    for now, coming in zip(steps, steps[1:], strict=False):
        assert torch.equal(feed.take(now, lambda coming=coming: coming), data.images[now])
    feed._ahead[1].result()
    assert gathered == [index.tolist() for index in steps]  # each once


def test_what_fails_in_the_thread_is_raised(data):
    feed = HostFeed(data.images, pin=False)
    beyond = torch.tensor([len(data)])
    feed.take(torch.tensor([0]), lambda: beyond)
    with pytest.raises(IndexError):
        feed.take(beyond, lambda: beyond)


@pytest.mark.parametrize("free, fed", [(4, False), (3, True)])
def test_a_data_set_may_take_a_quarter_of_the_devices_free_memory(data, monkeypatch, free, fed):
    asked = []

    def mem_get_info(device):
        asked.append(device)
        return free * data.images.numel(), 10**12

    monkeypatch.setattr(torch.cuda, "mem_get_info", mem_get_info)
    meta = torch.device("meta")
    placed = on_device(data, meta)
    assert (placed.feed is not None) == fed and asked == [meta]
    assert placed.images.device == (CPU if fed else meta) and placed.labels.device == meta


def test_on_a_cpu_nothing_is_copied(data):
    placed = on_device(data, CPU)
    assert placed.feed is None and placed.images.data_ptr() == data.images.data_ptr()
    index = torch.tensor([3, 1])
    assert torch.equal(images_of(placed, index, index, lambda: index), data.images[index])


def flags_of(images):
    """The kernel's flags of the mapping that holds the first image."""
    address, inside = images.data_ptr(), False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(found[1], 16) <= address < int(found[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return line.split()[1:]
    return []


def test_training_reads_a_mapped_file_without_readahead(tmp_path, data):
    page = resource.getpagesize()
    (tmp_path / "rows").write_bytes(data.images.numpy().tobytes().ljust(4 * page, b"\0"))
    rows = map_file(tmp_path / "rows").view(-1, 1, 8, 8)
    mapped = replace(data, images=rows[2 * page // 64 :])
    assert "rr" not in flags_of(mapped.images)
    on_device(mapped, CPU)
    assert "rr" in flags_of(mapped.images)
    assert "rr" not in flags_of(rows)  # another split, which is read in order
    on_device(replace(data, images=rows.clone()), CPU)  # in memory: nothing to tell
