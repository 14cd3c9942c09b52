"""Tensor files: whole or not there, and every damage is noticed."""

from pathlib import Path

import pytest
import torch

from tinylm import checkpoint, files
from tinylm.checkpoint import Checkpoint, CheckpointFolder, load_tensors, save_tensors
from tinylm.errors import InputError

TENSORS = {
    "a": torch.arange(1000, dtype=torch.float32).view(10, 100),
    "b": torch.tensor(3.0),
    "c": torch.ones(7, dtype=torch.bfloat16),
    "empty": torch.zeros(0, 4),
}


def test_round_trip(tmp_path: Path) -> None:
    save_tensors(tmp_path / "x.safetensors", TENSORS, {"step": 3, "text": "ä"})
    tensors, info = load_tensors(tmp_path / "x.safetensors")
    assert info == {"step": 3, "text": "ä"}
    assert tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert torch.equal(tensors[name], tensor)
        assert tensors[name].dtype == tensor.dtype


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_a_truncated_file_is_noticed(tmp_path: Path, share: float) -> None:
    path = tmp_path / "x.safetensors"
    save_tensors(path, TENSORS, {"step": 3})
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(InputError, match=r"x\.safetensors is damaged"):
        load_tensors(path)


def test_every_flipped_bit_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_tensors(path, TENSORS, {"step": 3})
    data = path.read_bytes()
    for position in range(0, len(data), 37):
        broken = bytearray(data)
        broken[position] ^= 1 << position % 8
        path.write_bytes(broken)
        try:
            tensors, info = load_tensors(path)
        except InputError:
            continue
        # The format's padding and name order carry nothing; all that counts must be equal.
        assert info == {"step": 3}
        assert all(torch.equal(tensors[n], t) for n, t in TENSORS.items())


def test_files_of_others_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(InputError, match="was not written by tinylm"):
        load_tensors(tmp_path / "x.safetensors")
    with pytest.raises(InputError, match="no such file"):
        load_tensors(tmp_path / "none.safetensors")


def test_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, keep=2)
    assert folder.load_newest(print) is None
    for step in (1, 5, 20):
        folder.save(Checkpoint(step, TENSORS, {"step": step}))
    assert folder.steps() == [5, 20]
    newest = folder.load_newest(print)
    assert newest is not None
    assert (newest.step, newest.state) == (20, {"step": 20})


def test_a_damaged_checkpoint_is_passed_over_and_that_is_said(tmp_path: Path) -> None:
    folder, said = CheckpointFolder(tmp_path), []
    for step in (1, 5):
        folder.save(Checkpoint(step, TENSORS, {"step": step}))
    folder.path(5).write_bytes(folder.path(5).read_bytes()[:-9])
    older = folder.load_newest(said.append)
    assert older is not None
    assert older.step == 1
    assert "step-00000005.safetensors is damaged" in said[0]
    assert "going back to the checkpoint before it" in said[0]
    folder.path(1).write_bytes(b"")
    with pytest.raises(InputError, match=r"every checkpoint in .* is damaged"):
        folder.load_newest(said.append)


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.safetensors"
    save_tensors(path, TENSORS, {"step": 1})

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(InputError, match=r"cannot write .*x\.safetensors: the disk is full"):
        save_tensors(path, TENSORS, {"step": 2})
    assert load_tensors(path)[1] == {"step": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def test_the_checksum_covers_names_and_info() -> None:
    one = torch.ones(2)
    checksums = {
        checkpoint._checksum(tensors, text)
        for tensors, text in [({"a": one}, "1"), ({"b": one}, "1"), ({"a": one}, "2")]
    }
    assert len(checksums) == 3
